"""The first cases of each source hold, and so do the shares that it promises."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.unseen import names, source

SLICE = 25
"""Cases of one test: many short tests keep several processes busy."""
SLICES = [(name, start) for name in names() for start in range(0, source(name).CI, SLICE)]


@pytest.fixture(scope="session")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder where the processes of this run put what they counted."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.mark.parametrize(("name", "start"), SLICES)
def test_cases_that_nobody_has_looked_at(name: str, start: int, counts: Path) -> None:
    drawn = source(name)
    tally: Counter[str] = Counter()
    failures = []
    for seed in range(start, min(start + SLICE, drawn.CI)):
        try:
            tally.update(drawn.case(seed))
        except Exception as error:  # all failures are reported at once, each with the line that repeats it
            failures.append(f"python -m tests.unseen {name} --seed {seed}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
    written = counts / f"{name}-{start}.part"
    written.write_text(json.dumps(tally))
    written.rename(written.with_suffix(".json"))
    found = [*counts.glob(f"{name}-*.json")]
    if len(found) == sum(n == name for n, _ in SLICES):  # the last one judges them all
        drawn.judge(sum((Counter(json.loads(f.read_text())) for f in found), Counter()), drawn.CI)


@pytest.mark.parametrize(("name", "seed"), [("modules", 284085761), ("modules", 470734436), ("modules", 1692350396)])
def test_seeds_that_failed_once(name: str, seed: int) -> None:
    """A refusal without a line (two), a state with as many rows as a mask picks."""
    source(name).case(seed)
