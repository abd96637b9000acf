"""The edge of the command line: whatever is raised inside ends as one named line and an exit status."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lagcompile.workbench import boundary, cli
from tests.workbench.specs import moons, replaced

Captured = pytest.CaptureFixture[str]


def raising(error: BaseException) -> int:
    def command() -> None:
        raise error

    return boundary.guarded(command)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/log.jsonl"), 2, "runs/x/log.jsonl: No space left"),
        (
            PermissionError(errno.EACCES, "Permission denied", "out"),
            2,
            "out: Permission denied: change its permissions",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), 2, "a: No such file or directory: check"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "save files as UTF-8"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested more deeply than Python follows"),
        (MemoryError(), 2, "out of memory: take fewer examples"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 2, "out of memory (DefaultCPU"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("x"), 70, "please report it with what this prints: LAGCOMPILE_DEBUG=1 lagcompile"),
    ],
)
def test_each_kind_of_error_has_a_name_and_a_status(
    error: BaseException, status: int, words: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAGCOMPILE_DEBUG", raising=False)
    assert raising(error) == status
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    monkeypatch.setenv("LAGCOMPILE_DEBUG", "1")
    assert raising(error) == status
    assert "Traceback" in capsys.readouterr().err


def run(folder: Path, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    environment |= {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "lagcompile.workbench.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, check=False, **options  # type: ignore[call-overload]
    )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_and_a_closed_pipe(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(tmp_path, "schema", stdout=full)
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["No space left on device: free some space there, or write to another place"],
    )
    spec = moons(tmp_path).name
    for arguments in (("schema",), ("show", spec), ("plan", spec), ("--help",)):
        reader, writer = os.pipe()
        os.close(reader)
        done = run(tmp_path, *arguments, stdout=writer)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, ""), arguments


def test_a_terminal_without_the_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    moons(tmp_path)
    replaced(tmp_path, "name: moons", "name: moons\nnote: Übergröße")
    (tmp_path / "ß.yaml").write_text("lagcompile: 1\nÜ: 1\n")
    done = run(tmp_path, "show", "ß.yaml", stdout=subprocess.PIPE)
    assert done.returncode == 2
    assert "unknown key" in done.stderr
