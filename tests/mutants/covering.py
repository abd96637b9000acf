"""Which tests run which lines, and how long they take.

In: a tree. Out: `Covering`, kept file by file: a file of tests is measured again when it, the package or what tests
share has changed. Invariant: only tests that pass are listed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import coverage

from tests.mutants import children

HOUR = 3600.0
"""More than any test takes."""


@dataclass(frozen=True)
class Covering:
    """What a run under coverage found.

    Attributes:
        lines: file -> line -> tests.
        seconds: of each test that passes.
        failing: tests that fail without any change.
        keys: file of tests -> digest of it, the package and what tests share.
    """

    lines: Mapping[str, Mapping[str, Sequence[str]]]
    seconds: Mapping[str, float]
    failing: Sequence[str]
    keys: Mapping[str, str]

    def key(self, test: str) -> str:
        """Digest of all that the outcome of a test depends on; of all tests where none is named."""
        return (
            self.keys.get(test.split("::", maxsplit=1)[0], "")
            if test
            else digest((), " ".join(sorted(self.keys.values())))
        )

    def tests(self, path: str, line: int, seconds: float) -> list[str]:
        """Tests that run a line, those of its room first, of them the quickest, as many as the time allows.

        A line that tests run only on import, or only in processes of their own, is covered by all tests that run any
        line of the file, and by those of the room.
        """
        own, room = self.lines.get(path, {}), f"tests/{Path(path).parent.name}/"
        any_line = {t for tests in own.values() for t in tests} | {t for t in self.seconds if t.startswith(room)}
        found, chosen, total = set(own.get(str(line), ())) or any_line, list[str](), 0.0
        for test in sorted(found, key=lambda t: (not t.startswith(room), self.seconds[t], t)):
            total += self.seconds[test]
            if chosen and total > seconds:
                break
            chosen.append(test)
        return chosen


def measure(root: Path, paths: Sequence[str], tests: Sequence[Path], kept: Path, jobs: int) -> Covering:
    """Run tests once under coverage, those of each file that was not measured yet.

    Args:
        root: the tree.
        paths: the files of the package that count.
        tests: files of tests.
        kept: folder of what was measured, one JSON file for each file of tests.
        jobs: processes.
    """
    kept.mkdir(parents=True, exist_ok=True)
    others = [p for p in sorted((root / "tests").rglob("*.py")) if not p.name.startswith("test_")]
    others = [p for p in others if p.parent != Path(__file__).parent]
    shared = digest([*sorted((root / "lagcompile").rglob("*.py")), *others])
    keys = {str(p.relative_to(root)): digest([p], shared)[:16] for p in tests}
    targets = {name: kept / f"{Path(name).stem}-{key}.json" for name, key in keys.items()}
    missing = [(root, name, paths, target) for name, target in targets.items() if not target.is_file()]
    with get_context("fork").Pool(jobs) as pool:
        for number, name in enumerate(pool.imap_unordered(_measured, missing), 1):
            print(f"coverage [{number}/{len(missing)}] {name}", flush=True)
    lines: dict[str, dict[str, list[str]]] = {p: {} for p in paths}
    seconds, failing = dict[str, float](), list[str]()
    for target in targets.values():
        found = json.loads(target.read_text())
        seconds |= {test: time for test, (what, time) in found["outcomes"].items() if what == "passed"}
        failing += [test for test, (what, _) in found["outcomes"].items() if what == "failed"]
        for path, own in found["lines"].items():
            for line, names in own.items():
                lines[path].setdefault(line, []).extend(n for n in names if n in seconds)
    return Covering(lines, seconds, failing, keys)


def digest(paths: Iterable[Path], start: str = "") -> str:
    """Of a text and the content of files."""
    found = hashlib.sha256(start.encode())
    for path in paths:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _measured(work: tuple[Path, str, Sequence[str], Path]) -> str:
    root, tests, paths, target = work
    with tempfile.TemporaryDirectory() as folder:
        data, settings = Path(folder) / "coverage", Path(folder) / "rc"
        rooms = sorted({str((root / p).parent) for p in paths})
        settings.write_text("\n    ".join([f"[run]\ndata_file = {data}\nsource =", *rooms]))
        options = ["--cov", f"--cov-config={settings}", "--cov-context=test", "--cov-report="]
        ending = children.run(root, [tests, *options], lambda test: HOUR)
        if ending.status not in (0, 1):
            raise SystemExit(f"{tests} did not run to its end: pytest ended with {ending}")
        found = {"lines": _lines(root, paths, data), "outcomes": ending.outcomes}
        target.with_suffix(".part").write_text(json.dumps(found))
    target.with_suffix(".part").replace(target)
    return f"{tests}, {ending.seconds:.0f} s"


def _lines(root: Path, paths: Sequence[str], data: Path) -> dict[str, dict[str, list[str]]]:
    read = coverage.CoverageData(str(data))
    read.read()
    return {
        path: {
            str(line): sorted({n.split("|")[0] for n in names if n})
            for line, names in read.contexts_by_lineno(str(root / path)).items()
            if any(names)
        }
        for path in paths
    }
