"""Whether tests notice a mutant.

In: mutants, what covers them. Out: `Verdict`s, kept as they come. Invariant: a mutant counts as killed only by a test
that passes alone on the code without the change, and that took less than a third of the limit there, if the limit
ended it; whatever is not killed for certain has survived.
"""

from __future__ import annotations

import compileall
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from py_compile import PycInvalidationMode
from tempfile import TemporaryDirectory

from tests.mutants import children
from tests.mutants.covering import Covering
from tests.mutants.draw import Mutant

NOT_FOUND = 4
"""Exit status of pytest where a named test does not exist: its file cannot be imported, or tests have other names."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed by which test, or survived how."""

    killed: bool
    test: str = ""
    hung: bool = False
    how: str = ""


class Journal:
    """Verdicts by mutant, one JSON line each.

    One holds while what its tests depend on is as it was: for the killed that is one test. Others say which test to
    try first.
    """

    def __init__(self, path: Path, covering: Covering) -> None:
        self.path, self.covering = path, covering
        self.known: dict[str, Verdict] = {}
        self.killers: dict[str, str] = {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            entry = json.loads(line)
            verdict = Verdict(**entry["verdict"])
            if verdict.killed:
                self.killers[entry["mutant"]] = verdict.test
            if entry["key"] == covering.key(verdict.test):
                self.known[entry["mutant"]] = verdict

    def add(self, mutant: Mutant, verdict: Verdict) -> None:
        """Keep a verdict."""
        self.known[mutant.name] = verdict
        entry = {"mutant": mutant.name, "key": self.covering.key(verdict.test), "verdict": asdict(verdict)}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def judged(mutants: Sequence[Mutant], judge: Judge, journal: Journal, jobs: int) -> list[Verdict]:
    """The verdicts on some mutants, those that the journal lacks from new runs."""
    open_ = [(m, journal.killers.get(m.name, "")) for m in mutants if m.name not in journal.known]
    with TemporaryDirectory(prefix="mutants-") as place, get_context("fork").Pool(jobs, judge.begin, (place,)) as pool:
        for number, (mutant, verdict) in enumerate(pool.imap_unordered(_tried, open_), 1):
            journal.add(mutant, verdict)
            told = f"killed by {verdict.test}" if verdict.killed else f"SURVIVED ({verdict.how})"
            print(f"[{number}/{len(open_)}] {told}: {mutant.path}:{mutant.line} {mutant.change}", flush=True)
    return [journal.known[m.name] for m in mutants]


class Judge:
    """Tries mutants in a tree of its own, one for each process."""

    here: Judge
    """That of this process."""

    def __init__(self, root: Path, covering: Covering, seconds: float) -> None:
        self.root, self.covering, self.seconds = root, covering, seconds
        self.sound: dict[str, bool] = {}

    def begin(self, folder: str) -> None:
        """Copy the tree into a folder; compiled files in it hold for a source of the same content only."""
        place, Judge.here = Path(tempfile.mkdtemp(dir=folder)), self
        for name in ("lagcompile", "tests", "specs", "examples"):
            shutil.copytree(self.root / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "Makefile"):
            shutil.copy(self.root / file, place / file)
        compileall.compile_dir(place / "lagcompile", quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        self.root = place

    def verdict(self, mutant: Mutant, killer: str) -> Verdict:
        """Try a mutant, first with the test that killed it the last time."""
        tests = self.covering.tests(mutant.path, mutant.line, self.seconds)
        near = f"tests/{Path(mutant.path).parent.name}/"
        groups = [[killer] if killer in self.covering.seconds else [], [t for t in tests if t.startswith(near)], tests]
        tried = set[str]()
        for group in groups:
            verdict = self._killed(mutant, [t for t in group if t not in tried])
            if verdict is not None:
                return verdict
            tried |= set(group)
        return Verdict(killed=False, how=f"{len(tried)} tests pass" if tried else "no test covers it")

    def _killed(self, mutant: Mutant, tests: list[str]) -> Verdict | None:
        while tests:
            with self._changed(mutant):
                ending = self._run(tests)
                if ending.status == NOT_FOUND and not ending.last:
                    ending = self._run([*dict.fromkeys(t.partition("::")[0] for t in tests)])
            if ending.status == 0:
                return None
            named = [t for t in tests if t == ending.last] or [t for t in tests if t.startswith(ending.last)]
            named = named or [ending.last]
            if self._is_sound(named[0]):
                return Verdict(killed=True, test=named[0], hung=ending.status is None)
            left = [t for t in tests if t not in named]
            tests = left if len(left) < len(tests) else []
        return None

    @contextmanager
    def _changed(self, mutant: Mutant) -> Iterator[None]:
        path = self.root / mutant.path
        original = path.read_text()
        path.write_text(mutant.source)
        try:
            yield
        finally:
            path.write_text(original)

    def _is_sound(self, test: str) -> bool:
        """Whether a test passes without any change, well within its limit."""
        if test not in self.sound:
            ending = self._run([test])
            self.sound[test] = ending.status == 0 and ending.seconds < self._limit(test) / 3
        return self.sound[test]

    def _run(self, tests: Sequence[str]) -> children.Ending:
        options = ["-x", "-p", "no:cov", f"--basetemp={self.root / 'temporary'}"]
        return children.run(self.root, [*options, *tests], self._limit)

    def _limit(self, test: str) -> float:
        """Processor time for a test; a name that is none is that of what is imported before the first."""
        return 20 + 5 * self.covering.seconds.get(test, 10.0)


def _tried(work: tuple[Mutant, str]) -> tuple[Mutant, Verdict]:
    return work[0], Judge.here.verdict(*work)
