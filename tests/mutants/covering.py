"""Which tests run which lines, and how long they take.

In: the tree. Out: `Covering`, kept in a file until the tree changes. Invariant: a line that only imports run is covered
by every test that runs any line of its file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import coverage


class Covering:
    """Tests by file and line, and seconds by test."""

    def __init__(self, lines: dict[str, dict[str, list[str]]], seconds: dict[str, float]) -> None:
        self.lines, self.seconds = lines, seconds

    def tests(self, path: str, line: int, seconds: float) -> tuple[list[str], float]:
        """Tests that run a line, the quickest first, as many as the time allows; and how long they take."""
        own = self.lines.get(path, {})
        found = own.get(str(line)) or {t for tests in own.values() for t in tests}
        chosen: list[str] = []
        total = 0.0
        for test in sorted(found, key=lambda t: (self.seconds.get(t, 1.0), t)):
            total += self.seconds.get(test, 1.0)
            if chosen and total > seconds:
                return chosen, seconds
            chosen.append(test)
        return chosen, total


def measure(root: Path, paths: Sequence[str], kept: Path, skip: Sequence[str]) -> Covering:
    """Run the tests once under coverage, or read what the last run found.

    Args:
        root: the tree.
        paths: the files that count.
        kept: JSON file of the result; removed by hand to measure again.
        skip: paths of tests that are left out.
    """
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(_measured(root, paths, skip)))
    found = json.loads(kept.read_text())
    return Covering(found["lines"], found["seconds"])


def _measured(root: Path, paths: Sequence[str], skip: Sequence[str]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        data, times = Path(folder) / "coverage", Path(folder) / "times.xml"
        settings = Path(folder) / "rc"
        settings.write_text(f"[run]\ndata_file = {data}\nsource = {root / 'lagcompile'}\n")
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", f"--junit-xml={times}"]
        command += ["--cov=lagcompile", f"--cov-config={settings}", "--cov-context=test", "--cov-report="]
        subprocess.run([*command, *(f"--ignore={s}" for s in skip)], cwd=root, check=True)
        read = coverage.CoverageData(str(data))
        read.read()
        lines: dict[str, dict[str, list[str]]] = {}
        for path in paths:
            contexts = read.contexts_by_lineno(str(root / path))
            lines[path] = {
                str(line): sorted({n.split("|")[0] for n in names if n})
                for line, names in contexts.items()
                if any(names)
            }
        return {"lines": lines, "seconds": _seconds(times)}


def _seconds(times: Path) -> dict[str, float]:
    found = {}
    for case in ElementTree.parse(times).iter("testcase"):
        path = str(case.get("classname")).replace(".", "/") + ".py"
        found[f"{path}::{case.get('name')}"] = float(case.get("time", 1.0))
    return found
