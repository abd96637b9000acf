"""A mutant is killed by a test that passes without it, well within its limit, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="pip install 'lagcompile[mutants]'")

from tests.mutants.covering import Covering
from tests.mutants.draw import Mutant, draw
from tests.mutants.verdict import Judge, Verdict

CODE = """\
def last(n: int) -> int:
    while n > 1:
        n -= 1
    return n
"""
IMPORT = "import time\nfrom lagcompile.ir.code import last\n"
BURN = "end = time.process_time() + 2; [0 for _ in iter(lambda: time.process_time() > end, True)]"
PATH = "lagcompile/ir/code.py"
Tried = Callable[[str, str], Verdict]


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tried:
    """Try one change of the code with one test."""
    monkeypatch.setattr(Judge, "_limit", lambda self, test: 4.0)

    def verdict(change: str, test: str) -> Verdict:
        root = tmp_path / "root"
        for folder in ("lagcompile/ir", "tests/ir", "specs", "examples"):
            (root / folder).mkdir(parents=True)
        for name in ("pyproject.toml", "README.md", "Makefile", "lagcompile/__init__.py", "lagcompile/ir/__init__.py"):
            (root / name).write_text("")
        (root / PATH).write_text(CODE)
        (root / "tests/ir/test_code.py").write_text(f"{IMPORT}\ndef test_it():\n    {test}\n")
        (root / "tests/ir/test_other.py").write_text(f"{IMPORT}\ndef test_other():\n    pass\n")
        seconds = {"tests/ir/test_code.py::test_it": 0.1, "tests/ir/test_other.py::test_other": 0.2}
        judge = Judge(root, Covering({}, seconds, [], {}), 10.0)
        judge.begin(str(tmp_path))
        old, new = change.split(" -> ")
        found = judge.verdict(Mutant(PATH, 2, CODE.replace(old, new), change), "")
        assert (judge.root / PATH).read_text() == CODE
        return found

    return verdict


@pytest.mark.parametrize(
    ("change", "test", "killed", "hung"),
    [
        ("n > 1 -> n > 2", "assert last(5) == 1", True, False),
        ("n > 1 -> n > 2", "assert last(1) == 1", False, False),
        ("n > 1 -> n > 2", "assert last(5) == 7", False, False),
        ("n -= 1 -> n += 1", "assert last(5) == 1", True, True),
        ("n -= 1 -> n += 1", f"{BURN}; last(5)", False, False),
        ("def last -> def first", "assert last(5) == 1", True, False),
    ],
    ids=["noticed", "not noticed", "fails anyway", "hangs", "slow anyway", "cannot be imported"],
)
def test_verdicts(change: str, test: str, killed: bool, hung: bool, tried: Tried) -> None:
    found = tried(change, test)
    assert (found.killed, found.hung) == (killed, hung), found
    assert found.test == ("tests/ir/test_code.py::test_it" if killed else "")


def test_a_draw_changes_each_place_once_and_stays_when_code_is_added(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(CODE)
    found = draw(tmp_path, ["code.py"], 100, 0)
    assert len({m.source for m in found}) == len(found) >= 4
    assert [m.name for m in draw(tmp_path, ["code.py"], 2, 0)] == [m.name for m in found[:2]]
    assert [m.name for m in draw(tmp_path, ["code.py"], 100, 1)] != [m.name for m in found]
    path.write_text("def more() -> int:\n    return 0\n\n\n" + CODE)
    places = [m.name.split("  ->  ")[0] for m in draw(tmp_path, ["code.py"], 100, 0)]
    assert [p for p in places if "return" not in p] == [m.name.split("  ->  ")[0] for m in found]
