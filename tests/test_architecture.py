"""The rules of DESIGN that hold the architecture together: imports only go down, heavy libraries stand in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "lagcompile"
BELOW = {
    "ir": {"ir"},
    "frontend": {"frontend", "ir"},
    "runtime": {"runtime", "frontend", "ir"},
    "exact": {"exact", "ir"},
    "export": {"export", "runtime", "frontend", "ir"},
    "dynamics": {"dynamics", "runtime", "frontend", "ir"},
    "store": {"store", "ir"},
    "backends": {"backends", "store", "dynamics", "runtime", "frontend", "ir", "exact"},
    "check": {"check", "runtime", "frontend", "ir", "exact"},
}
BELOW["workbench"] = {"workbench", *BELOW}


def _imports(path: Path) -> list[str]:
    """Modules that a file imports, at any depth of its code, type-checking blocks included."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def test_imports_only_go_down() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0]
        if room not in BELOW:
            continue
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "lagcompile" or len(parts) < 2:
                continue
            target = parts[1]
            if target not in BELOW[room] and not (room == "workbench" and target in {"lift", "saved", "__init__"}):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_programs_are_plain_data() -> None:
    for name in ("program", "text", "axes"):
        assert not [m for m in _imports(ROOT / "ir" / f"{name}.py") if m.split(".")[0] == "torch"]


def test_heavy_libraries_stand_in_few_places() -> None:
    rooms: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        for name in _imports(path):
            rooms.setdefault(name.split(".")[0], set()).add(path.relative_to(ROOT).parts[0])
    assert rooms.get("cvxpy", set()) <= {"exact", "backends"}
    assert rooms.get("typer", set()) <= {"workbench"}
    assert rooms.get("rich", set()) <= {"workbench", "exact"}


def test_import_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, lagcompile; heavy = {'cvxpy', 'matplotlib', 'sklearn', 'rich', 'typer', 'casadi', 'PIL', "
        "'scipy', 'optuna', 'torchdiffeq'}; print(sorted(heavy & set(sys.modules)))"
    )
    before = "import sys, torch; print(sorted({'scipy'} & set(sys.modules)))"
    ours = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch_alone = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, check=True).stdout
    assert ours == torch_alone


def test_no_room_is_too_large() -> None:
    large = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not large
