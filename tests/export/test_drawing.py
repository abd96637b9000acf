"""Drawings: texts stand apart and on the page, connections in lanes of their own; files of each kind; wrong kinds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.export.cells import MOST, picture, quantity, shortened
from lagcompile.export.drawing import KINDS, _figure_class, _Ruler, draw
from lagcompile.export.layout import Layout, Text, columns_of, layout
from tests.export.programs import program
from tests.nets import Residual, deep


class Dense(nn.Module):
    """Skips over one and several rows, several states at a breakpoint, several from one stage and into one."""

    def __init__(self) -> None:
        super().__init__()
        self.a_layer_with_a_rather_long_name = nn.ModuleList(nn.Linear(6, 6) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for i, layer in enumerate(self.a_layer_with_a_rather_long_name):
            x = torch.tanh(layer(x))
            seen.append(x)
            if i % 2 == 0:
                x = x + torch.stack(seen[::3]).sum(0)
        return x


def dense() -> lc.Program:
    after = [f"a_layer_with_a_rather_long_name.{i}" for i in range(8)]
    return lc.lift(Dense(), (torch.randn(4, 6),), split={"policy": "at", "after": after}).program


PROGRAMS: dict[str, Callable[[], lc.Program]] = {
    "one": lambda: lc.lift(deep(2), (torch.randn(4, 5),), split=1).program,
    "residual": lambda: lc.lift(Residual(), (torch.randn(4, 6),), split=3).program,
    "dense": dense,
    "deep": lambda: lc.lift(deep(16), (torch.randn(4, 5),), split=16).program,
    "distprop": lambda: program("digits_distprop")[0],
    "mixed": lambda: program("mixed")[0],
    "unknown": lambda: lc.lift(deep(3), split=3).program,
    "many": lambda: lc.lift(deep(70), (torch.randn(4, 5),), split=70).program,
}

Area = tuple[float, float, float, float]


def placed(made: lc.Program) -> tuple[Layout, _Ruler]:
    ruler = _Ruler(_figure_class()(figsize=(1, 1), dpi=150))
    return layout(picture(made), ruler), ruler


def area(text: Text, ruler: _Ruler) -> Area:
    width, height = ruler(text.text, text.size, text.bold)
    left = {"left": text.x, "center": text.x - width / 2}[text.horizontal]
    low = {"top": text.y - height, "center": text.y - height / 2, "bottom": text.y}[text.vertical]
    return left, low, left + width, low + height


def overlap(a: Area, b: Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def segments(found: Layout, roles: tuple[str, ...]) -> Iterator[tuple[int, Area]]:
    for number, line in enumerate(found.lines):
        if line.role in roles:
            for (x, y), (u, v) in zip(line.points, line.points[1:], strict=False):
                yield number, (min(x, u), min(y, v), max(x, u), max(y, v))


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_overlaps_and_nothing_is_cut_off(name: str) -> None:
    found, ruler = placed(PROGRAMS[name]())
    areas = [(t, area(t, ruler)) for t in found.texts]
    for text, (left, low, right, high) in areas:
        assert left >= 0, text
        assert right <= found.width, text
        assert low >= 0, text
        assert high <= found.height, text
    for (one, a), (two, b) in combinations(areas, 2):
        assert not overlap(a, b), (one, two)
    for box in found.boxes:
        edge = (box.x, box.y, box.x + box.width, box.y + box.height)
        for text, (left, low, right, high) in areas:
            if overlap(edge, (left, low, right, high)):  # what touches a box lies within it
                assert edge[0] <= left, text
                assert right <= edge[2], text
                assert edge[1] <= low, text
                assert high <= edge[3], text
    for one_box, two_box in combinations(found.boxes, 2):
        assert not overlap(
            (one_box.x, one_box.y, one_box.x + one_box.width, one_box.y + one_box.height),
            (two_box.x, two_box.y, two_box.x + two_box.width, two_box.y + two_box.height),
        )


@pytest.mark.parametrize("name", ["residual", "dense", "deep"])
def test_long_connections_have_lanes_of_their_own(name: str) -> None:
    found, ruler = placed(PROGRAMS[name]())
    skips = list(segments(found, ("skip",)))
    turning = [number for number, line in enumerate(found.lines) if line.role == "state" and len(line.points) > 3]
    lanes = skips + [s for s in segments(found, ("state",)) if s[0] in turning]
    for (i, a), (j, b) in combinations(lanes, 2):
        same_height = a[1] == a[3] == b[1] == b[3]
        same_place = a[0] == a[2] == b[0] == b[2]
        along = (same_height and a[0] < b[2] and b[0] < a[2]) or (same_place and a[1] < b[3] and b[1] < a[3])
        assert i == j or not along
    for box in found.boxes:
        inside = (box.x + 0.01, box.y + 0.01, box.x + box.width - 0.01, box.y + box.height - 0.01)
        assert not any(overlap(inside, (x, y, u + 1e-6, v + 1e-6)) for _, (x, y, u, v) in lanes)
    for text in found.texts:
        if text.role in {"skip name", "cut", "data"}:
            own = area(text, ruler)
            crossed = [s for _, s in skips if overlap(own, (s[0], s[1], s[2] + 1e-6, s[3] + 1e-6))]
            assert len(crossed) <= (text.role == "skip name")


def test_what_is_said() -> None:
    said = picture(PROGRAMS["residual"]())
    assert said.title == "Residual: 3 stages, 2 states, 291 weights"
    assert [(s.name, s.start, s.end) for s in said.skips] == [("h1", 0, 2)]
    assert said.cells[0].facts == ("84 weights, 336 B", "168 flop")
    assert said.cells[0].labels[0].lines == ("12", "table, 48 B")
    assert [c.share for c in said.cells][-1] == 1.0
    assert said.cells[2].data == ("gt: 1", "size: 1")
    assert said.notes == ("second.weight is one variable in f1, f2",)
    assert said.cells[-1].breakpoint is None
    unknown = picture(PROGRAMS["unknown"]())
    assert unknown.cells[0].data == ("input_1: ?",)
    assert unknown.cells[0].facts == ("30 weights, 120 B", "shapes not known")
    mixed = picture(PROGRAMS["mixed"]())
    assert not mixed.cells[0].labels[0].kept
    many = picture(PROGRAMS["many"]())
    assert len(many.cells) == 41
    assert many.cells[20].modules == (f"{70 - 40} more", "stages")
    assert MOST < 70
    assert [columns_of(n) for n in (1, 3, 4, 5, 16, 24, 60)] == [1, 3, 4, 3, 4, 6, 6]
    assert (quantity(1_180_000), quantity(12)) == ("1.18 M", "12 ")
    assert shortened("a" * 40, 11) == "aaaaa\u2026aaaaa"


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind: str, tmp_path: Path) -> None:
    lifted = lc.lift(Residual(), (torch.randn(4, 6),), split=3)
    path = lifted.draw(tmp_path / f"stages{kind}")
    begins = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[kind]
    assert path.read_bytes().startswith(begins)
    if kind == ".svg":
        first = path.read_bytes()
        assert lifted.draw(path).read_bytes() == first


def test_wrong_files_and_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = PROGRAMS["one"]()
    with pytest.raises(lc.DataError, match=r"stages\.jpg: a drawing is an \.svg, \.png or \.pdf file, not '\.jpg'"):
        draw(made, tmp_path / "stages.jpg")
    with pytest.raises(lc.DataError, match="there is no folder"):
        draw(made, tmp_path / "absent" / "stages.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(lc.MissingExtraError, match=r"pip install 'lagcompile\[plots\]'"):
        draw(made, tmp_path / "stages.svg")
    assert list(tmp_path.iterdir()) == []
