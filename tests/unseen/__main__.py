"""Draw fresh cases for a while; print each that fails with the line that repeats it, and nothing else.

python -m tests.unseen --seconds 40          all sources in turn, seeds that no run has used
python -m tests.unseen modules --seed 123    one case again, with its traceback
python -m tests.unseen --nightly FILE        the nightly number of cases of each source; counts go to FILE
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from tests.unseen import names, source

FRESH = 1 << 20
"""Seeds below are those of `make test` and `make nightly`."""


def tried(name: str, seed: int) -> tuple[dict[str, int], str]:
    """Counts of one case, and the failure in one line ('' where there is none)."""
    try:
        return dict(source(name).case(seed)), ""
    except Exception as error:  # what is not an AssertionError is an uncaught error of the package: a failure too
        first = (str(error).strip().splitlines() or [""])[0]
        return {"failed": 1}, f"{type(error).__name__}: {first[:200]}"


def report(name: str, seed: int, failure: str) -> None:
    """One line for one failure."""
    print(f"python -m tests.unseen {name} --seed {seed}   # {failure}", flush=True)


def draw(seconds: float, chosen: list[str]) -> int:
    """Fresh cases of each source in turn until the time is over; the number of failures."""
    end, fresh, failures = time.monotonic() + seconds, random.SystemRandom(), 0
    for name in cycle(chosen):
        if time.monotonic() > end:
            break
        seed = fresh.randrange(FRESH, 1 << 31)
        _, failure = tried(name, seed)
        if failure:
            failures += 1
            report(name, seed, failure)
    return failures


def nightly(path: Path, chosen: list[str], jobs: int) -> int:
    """The nightly cases of each source; counts are added to a JSON file."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    failures = 0
    for name in chosen:
        begin, count = time.monotonic(), source(name).NIGHTLY
        tally: Counter[str] = Counter()
        with ProcessPoolExecutor(jobs, initializer=_quiet) as pool:
            for seed, (counts, failure) in enumerate(pool.map(partial(tried, name), range(count), chunksize=8)):
                tally.update(counts)
                if failure:
                    failures += 1
                    report(name, seed, failure)
        try:
            source(name).judge(tally, count)
        except AssertionError as error:
            failures += 1
            print(f"{name}: {error}", flush=True)
        found[name] = {"cases": count, **dict(sorted(tally.items())), "seconds": round(time.monotonic() - begin)}
        path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    return failures


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.enable()


def main() -> int:
    """Parse the command line and run; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.unseen", description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="*", help="names of sources; none for all")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seed", type=int, help="repeat this case of one source, with its traceback")
    parser.add_argument("--nightly", type=Path, metavar="FILE", help="run the nightly number of cases")
    parser.add_argument("--jobs", type=int, default=2, help="processes of the nightly run")
    options = parser.parse_args()
    unknown = set(options.source) - set(names())
    if unknown:
        parser.error(f"no source {sorted(unknown)[0]!r}; there are {', '.join(names())}")
    _quiet()
    chosen = options.source or names()
    if options.seed is not None:
        print(dict(source(chosen[0]).case(options.seed)))
        return 0
    if options.nightly is not None:
        return int(nightly(options.nightly, chosen, options.jobs) > 0)
    return int(draw(options.seconds, chosen) > 0)


if __name__ == "__main__":
    sys.exit(main())
