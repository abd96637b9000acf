"""The list of digests beside files: what was changed is named, what was not is read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import lagcompile as lc
from lagcompile.ir import sums


def test_what_was_changed_is_named_and_nothing_else(tmp_path: Path) -> None:
    content = {"a": b"one", "b": b"two", "c": b""}
    sums.write(tmp_path, content)
    assert sums.problems(tmp_path) == []
    assert {n: sums.read(tmp_path / n) for n in content} == content
    lines = (tmp_path / sums.SUMS).read_text().splitlines()
    assert lines[:3] == [f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in content.items()]
    (tmp_path / "b").write_bytes(b"three")
    (tmp_path / "c").unlink()
    (tmp_path / "d").write_bytes(b"not listed")
    found = sums.problems(tmp_path)
    assert [str(tmp_path / name) in p for name, p in zip("bc", found, strict=True)] == [True, True]
    for name in "bc":
        with pytest.raises(lc.DataError):
            sums.read(tmp_path / name)
    assert sums.read(tmp_path / "d") == b"not listed"
    assert [sums.is_listed(tmp_path / name) for name in "abcd"] == [True, True, True, False]


def test_files_that_change_from_now_on_are_listed_no_more(tmp_path: Path) -> None:
    sums.write(tmp_path, {"a": b"one", "b": b"two"})
    sums.write(tmp_path, {"a": b"new"}, without=["b"])
    assert sums.problems(tmp_path) == []
    (tmp_path / "b").write_bytes(b"else")
    assert sums.problems(tmp_path) == []
    assert sums.read(tmp_path / "a") == b"new"


def test_a_damaged_list_is_named_and_begun_anew_on_demand(tmp_path: Path) -> None:
    sums.write(tmp_path, {"a": b"one"})
    path = tmp_path / sums.SUMS
    path.write_bytes(path.read_bytes().replace(b"  a", b"  b"))
    (problem,) = sums.problems(tmp_path)
    assert str(path) in problem
    for write in (sums.listed, lambda folder: sums.write(folder, {"a": b"two"})):
        with pytest.raises(lc.DataError, match="is damaged"):
            write(tmp_path)
    sums.write(tmp_path, {"a": b"two"}, anew=True)
    assert sums.problems(tmp_path) == []
