"""Files that are no text, no JSON or no program: one named problem with file and place, never another exception."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

import lagcompile as lc
from lagcompile.dynamics import read_csv
from lagcompile.ir.jsonfile import parse
from lagcompile.ir.text import from_json, from_yaml, to_json
from tests.nets import deep


@pytest.fixture(scope="module")
def program() -> str:
    return to_json(lc.lift(deep(3), (torch.randn(4, 5),), split=2).program)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\xff\xfe{\0}\0", "x.json: the file is not UTF-8 text but UTF-16: save it as UTF-8"),
        (
            b'{\n"a": "\xe9"}',
            "x.json:2: the file is not UTF-8 text (byte 8): save it as UTF-8, or take an undamaged copy",
        ),
        (b'{\n\n"a": "\0"}', "x.json:3: the file holds a NUL byte: it is damaged, or not text"),
        (b"", "x.json:1:1: not valid JSON: the file is empty: it may have been cut short"),
        (b'{"a": 1,\n "b"', "x.json:2:5: not valid JSON: expecting ':' delimiter: it may have been cut short"),
        (
            b'{"residuals": 1, "residuals": 2}',
            "x.json: the key 'residuals' is given twice in one mapping: keep one of them",
        ),
        (b'{"a": 1, "a": 2}', "x.json:1: this is not a certificate (it says `residuals:`)"),
        (b"[" * 100_000, "x.json: the values are nested too deeply"),
        (b"[" * 90 + b"]" * 90, "x.json: the values are nested too deeply"),
        (
            b"[" + b"7" * 5000 + b"]",
            "x.json: a number of 5000 digits is too long",
        ),
        (b"[1]", "x.json: expected a mapping of keys to values, got a list"),
    ],
)
def test_what_is_no_certificate(data: bytes, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_bytes(data)
    with pytest.raises(lc.DataError) as caught:
        lc.Certificate.load("x.json")
    assert caught.value.problems == (problem,)


def test_a_certificate_names_every_wrong_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    lifted = lc.lift(deep(3), (x,), split=2)
    text = lifted.verify(x, y, loss=torch.nn.functional.mse_loss).save("c.json").read_text()
    Path("c.json").write_text(text.replace('"seed": ', '"seed": "zero",\n  "sed": ', 1))
    with pytest.raises(lc.DataError) as caught:
        lc.Certificate.load("c.json")
    line = 1 + text[: text.index('"seed"')].count("\n")
    assert any(p.startswith(f"c.json:{line}: seed: expected an integer, got 'zero'") for p in caught.value.problems)
    assert any(p.startswith(f"c.json:{line + 1}: sed: unknown key") for p in caught.value.problems)


def test_a_mark_at_the_beginning_and_other_line_ends(program: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes("﻿split:\r\n  policy: balanced\r\n  stages: 2\r\n".encode())
    assert len(lc.lift(deep(3), (torch.randn(4, 5),), split=tmp_path / "s.yaml").stages) == 2


def test_a_program_names_line_and_key(program: str) -> None:
    lines = program.splitlines()
    number = next(i for i, line in enumerate(lines) if '"flops"' in line)
    lines[number] = lines[number].replace('"flops"', '"flop"')
    with pytest.raises(lc.ProgramError, match=rf"program\.json:{number + 1}: stages\[0\]\.flop: unknown key"):
        from_json("\n".join(lines))
    for text in ("null", "[]", '"x"', "{", program[:-40]):
        with pytest.raises(lc.ProgramError, match=r"program\.json"):
            from_json(text)


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000, "a: " + "9" * 5000, "a: 0x" + "f" * 9000])
def test_yaml_that_is_nested_or_long_beyond_reason(text: str) -> None:
    with pytest.raises(lc.SpecError, match=r"program\.yaml"):
        from_yaml(text)


def test_a_pipe_that_nobody_writes_to_keeps_nobody_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "x"
    os.mkfifo(pipe)
    with pytest.raises(lc.DataError, match="expected a JSON file, got a pipe that nobody writes to"):
        lc.Certificate.load(pipe)
    with pytest.raises(lc.DataError, match="expected a CSV file, got a pipe"):
        read_csv(pipe, outputs=["a"])
    with pytest.raises(lc.SpecError, match="expected a YAML file, got a pipe"):
        lc.lift(deep(3), (torch.randn(4, 5),), split=pipe)


def test_what_is_too_large_is_not_read_first(tmp_path: Path) -> None:
    with (tmp_path / "x.csv").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(lc.DataError, match=r"x\.csv: the file is larger than [0-9,]+ KiB, the most for a CSV file"):
        read_csv(tmp_path / "x.csv", outputs=["a"])
    for more, said in ((0, "not valid JSON"), (1, "larger than 65,536 KiB, the most for a JSON file")):
        with (tmp_path / "x.json").open("wb") as file:
            file.write(b"[")
            file.seek((1 << 26) + more - 1)
            file.write(b"[")
        with pytest.raises(lc.DataError, match=said if more else "NUL"):
            lc.Certificate.load(tmp_path / "x.json")


def test_numbers_that_not_every_reader_of_json_takes() -> None:
    low, high = -(1 << 63), (1 << 63) - 1
    text = f"[{low}, {high}, 1e308]"
    assert parse(text, "x", standard=True) == [low, high, 1e308]
    for number, problem in (
        (str(low - 1), f"the number {low - 1} does not fit into 64 bits"),
        (str(high + 1), f"the number {high + 1} does not fit into 64 bits"),
        ("9" * 40, f"the number {'9' * 30} does not fit into 64 bits"),
        ("9" * 40 + "e300", f"the number {'9' * 30} is too large"),
        ("NaN", "NaN is not a number in JSON"),
        ("-Infinity", "-Infinity is not a number in JSON"),
    ):
        with pytest.raises(lc.DataError) as caught:
            parse(f"[{number}]", "x", standard=True)
        assert caught.value.problems == (f"x: {problem}",)
    assert parse("[9e999, -Infinity, 99999999999999999999]", "x") == [math.inf, -math.inf, 99999999999999999999]


def test_json_that_yaml_does_not_read_has_its_problems_without_lines() -> None:
    with pytest.raises(lc.ProgramError, match=r"program\.json: nam\\x7f: unknown key"):
        from_json('{"nam\x7f": 1}')


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text('split: {policy: at, after: ["\\e[2Jx"], "\\a": 1}\n')
    with pytest.raises(lc.SpecError) as caught:
        lc.lift(deep(3), (torch.randn(4, 5),), split=tmp_path / "x.yaml")
    assert str(caught.value).replace("\n", "").isprintable()
    (tmp_path / "x.yaml").write_text('split: {policy: at, after: ["\\e[2Jx"]}\n')
    with pytest.raises(lc.SplitError, match=r"'\\x1b\[2Jx'"):
        lc.lift(deep(3), (torch.randn(4, 5),), split=tmp_path / "x.yaml")


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    lifted = lc.lift(deep(3), (x,), split=2)
    made = lifted.verify(x, y, loss=torch.nn.functional.mse_loss)
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "no" / "x", tmp_path / "file" / "x", Path()):
        for write in (lifted.save_split, made.save):
            with pytest.raises(lc.DataError, match="cannot be written"):
                write(place)


def test_devices_and_streams_are_written_to_not_replaced() -> None:
    lifted = lc.lift(deep(3), (torch.randn(4, 5),), split=2)
    reader, writer = os.pipe()
    lifted.save_split(f"/dev/fd/{writer}")
    assert os.read(reader, 1000).startswith(b"split:")
    os.close(reader)
    with pytest.raises(lc.DataError, match="cannot be written"):
        lifted.save_split(f"/dev/fd/{writer}")
    os.close(writer)
    lifted.save_split(os.devnull)
    assert Path(os.devnull).is_char_device()
