"""The first cases of each source hold, and so do the shares that it promises."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.unseen import names, source


@pytest.mark.parametrize("name", names())
def test_cases_that_nobody_has_looked_at(name: str) -> None:
    drawn = source(name)
    tally: Counter[str] = Counter()
    failures = []
    for seed in range(drawn.CI):
        try:
            tally.update(drawn.case(seed))
        except Exception as error:  # all failures are reported at once, each with the line that repeats it
            failures.append(f"python -m tests.unseen {name} --seed {seed}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
    drawn.judge(tally, drawn.CI)
