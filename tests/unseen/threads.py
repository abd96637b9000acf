"""Random mixtures of work in eight threads: each gives what it gives alone, and the process is left as it was."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping

from tests import test_threads as work

CI, NIGHTLY = 3, 60
JOBS = (
    work.lifting,
    work.exporting,
    work.refused,
    work.verifying,
    work.solving,
    work.dropping,
    work.exact,
    work.plain,
)


def case(seed: int) -> Mapping[str, int]:
    """A second of one mixture."""
    draw = random.Random(seed)
    jobs = [*draw.choices(JOBS, k=7), work.plain]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failures = work.together(jobs, 1.0)
    assert not failures, failures
    return {"mixtures": 1}


def judge(tally: Mapping[str, int], cases: int) -> None:
    """All ran."""
    assert tally["mixtures"] == cases
