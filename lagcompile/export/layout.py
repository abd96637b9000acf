"""Places of everything in a drawing, in inches, from measured texts.

In: a `Picture` and a function that measures text. Out: `Layout`: boxes, lines, texts. Invariant: boxes are wide enough
for what is written in them and gaps for their labels; skip connections run in separate lanes above the rows and
beside them, so that no two of them lie on each other and none crosses a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lagcompile.export.cells import Cell, Picture, Skip

Measure = Callable[[str, float, bool], tuple[float, float]]
"""Width and height in inches of a text of a size in points, bold or not."""

TITLE, NAME, TEXT, SMALL = 12.0, 11.0, 8.0, 7.0
PAD, LINE, LANE, ENTER = 0.1, 0.155, 0.17, 0.3
BAR = 0.06


@dataclass(frozen=True)
class Text:
    """A text at a point."""

    x: float
    y: float
    text: str
    size: float
    role: str
    horizontal: str = "center"
    vertical: str = "center"
    bold: bool = False


@dataclass(frozen=True)
class Box:
    """A stage: lower left corner, size, share of the cost bar."""

    x: float
    y: float
    width: float
    height: float
    share: float
    drawn: bool


@dataclass(frozen=True)
class Line:
    """A line through points; an arrow at its end where `arrow`."""

    points: tuple[tuple[float, float], ...]
    role: str
    arrow: bool = False


@dataclass
class Layout:
    """All shapes, and the size of the page; y grows upwards from 0."""

    width: float = 0.0
    height: float = 0.0
    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)


def columns_of(count: int) -> int:
    """Return the stages of a row: one row of up to four, else rows of a page a little wider than high."""
    if count <= 4:
        return max(count, 1)
    wanted = math.sqrt(1.3 * count)
    return min(range(3, 7), key=lambda c: (-count % c) + 2.0 * abs(c - wanted))


def layout(picture: Picture, measure: Measure) -> Layout:
    """Place a picture."""
    return _Placer(picture, measure).placed()


class _Placer:
    def __init__(self, picture: Picture, measure: Measure) -> None:
        self.picture = picture
        self.measure = measure
        self.cells = picture.cells
        self.columns = columns_of(len(self.cells))
        self.rows = -(-len(self.cells) // self.columns)
        self.out = Layout()
        self.box_width = max(self._box_width(c) for c in self.cells)
        self.gap = max(max((self._gap_width(c) for c in self.cells), default=0.0), 0.75)
        self.box_height = max(max(self._box_height(c) for c in self.cells), 0.9)
        self.left = self._left()
        self.above, self.beside = self._lanes()
        self.below = [self._below(r) for r in range(self.rows)]

    # ------------------------------------------------------------ sizes
    def _wide(self, text: str, size: float, bold: bool = False) -> float:
        return self.measure(text, size, bold)[0]

    def _box_width(self, cell: Cell) -> float:
        lines = [self._wide(cell.name, NAME, True), *(self._wide(m, TEXT) for m in cell.modules)]
        return max(1.1, *(w + 2 * PAD for w in [*lines, *(self._wide(f, SMALL) for f in cell.facts)]))

    def _box_height(self, cell: Cell) -> float:
        inside = 0.3 + LINE * (len(cell.modules) + len(cell.facts)) + BAR + 3 * PAD
        return max(inside, sum(self._label_height(len(label.lines)) for label in cell.labels))

    def _label_height(self, lines: int) -> float:
        return 0.22 + (LINE - 0.02) * lines + 0.1

    def _gap_width(self, cell: Cell) -> float:
        words = [self._wide(label.name, TEXT, True) for label in cell.labels]
        words += [self._wide(line, SMALL) for label in cell.labels for line in label.lines]
        return max(words, default=0.0) + 0.4

    def _below(self, row: int) -> float:
        """Height under a row's boxes, for the data that its stages read and the number of a breakpoint."""
        data = max(len(self._data(i)) for i in self._members(row))
        return 0.28 + LINE * data

    def _data(self, index: int) -> tuple[str, ...]:
        """Data under a box; what the first stage reads comes from the left."""
        return () if index == 0 else self.cells[index].data

    def _left(self) -> float:
        first = [self._wide(d, TEXT) for d in self.cells[0].data]
        return max([*(w + 0.45 for w in first), 0.55])

    def _members(self, row: int) -> range:
        return range(row * self.columns, min((row + 1) * self.columns, len(self.cells)))

    # ------------------------------------------------------------ lanes of long connections
    def _long(self) -> list[tuple[Skip | int, int, int]]:
        """Connections that need lanes: skips, and the turn from the end of a row to the start of the next."""
        turns = [(r, (r + 1) * self.columns - 1, (r + 1) * self.columns) for r in range(self.rows - 1)]
        return [*((s, s.start, s.end) for s in self.picture.skips), *turns]

    def _lanes(self) -> tuple[list[dict[int, int]], dict[int, int]]:
        """For each row, lane above it by connection; and lane beside the rows by connection."""
        above: list[list[tuple[float, float, int]]] = [[] for _ in range(self.rows)]
        beside: list[tuple[float, float, int]] = []
        for number, (what, start, end) in enumerate(self._long()):
            a, b = start // self.columns, end // self.columns
            source, target = self._column(start) + 0.9, float(self._column(end))
            if isinstance(what, int):  # a turn leaves from the side
                above[b].append((-1.0, float(self.columns), number))
                beside.append((a, b, number))
            elif a == b:
                above[a].append((source, target + 0.6, number))
            else:
                above[a].append((source, float(self.columns), number))
                above[b].append((target, float(self.columns), number))
                beside.append((a - 0.4, b, number))
        return [_coloured(spans) for spans in above], _coloured(beside)

    def _column(self, index: int) -> int:
        return index % self.columns

    def _count(self, lanes: dict[int, int]) -> int:
        return 1 + max(lanes.values(), default=-1)

    # ------------------------------------------------------------ placing
    def placed(self) -> Layout:
        """The layout."""
        title = 0.45
        beside = 0.25 + LANE * self._count(self.beside)
        row_width = self.columns * (self.box_width + self.gap)
        self.channel = self.left + row_width + 0.05
        self.out.width = self.channel + beside
        notes = LINE * len(self.picture.notes) + (0.12 if self.picture.notes else 0.0)
        heights = [
            0.3 + LANE * self._count(a) + self.box_height + b for a, b in zip(self.above, self.below, strict=True)
        ]
        self.out.height = title + sum(heights) + notes + 0.25
        wide = self._wide(self.picture.title, TITLE, True) + 0.6
        words = [self._wide(n, TEXT) + 0.6 for n in (*self.picture.notes, SUBTITLE)]
        self.out.width = max(self.out.width, wide, *words)
        top = self.out.height
        self._text(0.3, top - 0.18, self.picture.title, TITLE, "title", horizontal="left", bold=True)
        self._text(0.3, top - 0.42, SUBTITLE, SMALL, "fact", horizontal="left")
        y = top - title - 0.05
        self.base: list[float] = []
        for height, below in zip(heights, self.below, strict=True):
            y -= height
            self.base.append(y + below)
        for i, cell in enumerate(self.cells):
            self._cell(i, cell)
        for number, (what, start, end) in enumerate(self._long()):
            if isinstance(what, int):
                self._turn(number, start, end)
            else:
                self._skip(number, what)
        for k, note in enumerate(self.picture.notes):
            self._text(0.3, y - 0.08 - LINE * k, note, TEXT, "fact", horizontal="left", vertical="top")
        return self.out

    def _corner(self, index: int) -> tuple[float, float]:
        row = index // self.columns
        return self.left + self._column(index) * (self.box_width + self.gap), self.base[row]

    def _text(self, x: float, y: float, text: str, size: float, role: str, **options: str | bool) -> None:
        self.out.texts.append(Text(x, y, text, size, role, **options))  # type: ignore[arg-type]

    def _cell(self, index: int, cell: Cell) -> None:
        x, y = self._corner(index)
        width, height = self.box_width, self.box_height
        self.out.boxes.append(Box(x, y, width, height, cell.share, bool(cell.name)))
        middle = x + width / 2
        if cell.name:
            self._text(middle, y + height - PAD, cell.name, NAME, "name", vertical="top", bold=True)
        room = y + PAD + BAR + LINE * len(cell.facts) + (height - 0.3 - PAD - BAR - LINE * len(cell.facts)) / 2
        for k, module in enumerate(cell.modules):
            shift = (len(cell.modules) - 1) / 2 - k
            self._text(middle, room + LINE * shift - 0.03, module, TEXT, "module" if cell.name else "fact")
        for k, fact in enumerate(reversed(cell.facts)):
            self._text(middle, y + PAD + BAR + 0.07 + LINE * k, fact, SMALL, "fact")
        for k, line in enumerate(self._data(index)):
            self._text(middle, y - 0.1 - LINE * k, line, SMALL, "data", vertical="top")
        if index == 0:
            self._inputs(cell)
        self._labels(index, cell)

    def _inputs(self, cell: Cell) -> None:
        x, y = self._corner(0)
        for k, line in enumerate(cell.data):
            at = y + self.box_height * (len(cell.data) - k) / (len(cell.data) + 1)
            self.out.lines.append(Line(((0.15, at), (x, at)), "data", True))
            self._text((0.15 + x) / 2 - 0.05, at + 0.04, line, TEXT, "data", vertical="bottom")

    def _labels(self, index: int, cell: Cell) -> None:
        """Values behind a stage: arrows to the next, name above the arrow, facts below it."""
        x, y = self._corner(index)
        start, end = x + self.box_width, x + self.box_width + self.gap
        cut = (start + end) / 2
        last_in_row = self._column(index) == self.columns - 1
        total = sum(self._label_height(len(label.lines)) for label in cell.labels)
        top = y + (self.box_height + total) / 2
        if cell.breakpoint is not None and any(label.kept for label in cell.labels):
            ends = [y - 0.08, y + self.box_height + 0.08]
            heights = [self._label_height(len(label.lines)) for label in cell.labels]
            tops = [top - sum(heights[:k]) for k in range(len(heights))]
            bounds = [ends[1], *(b for t, h in zip(tops, heights, strict=True) for b in (t, t - h + 0.08)), ends[0]]
            for high, low in zip(bounds[::2], bounds[1::2], strict=True):
                if high - low > 0.03:
                    self.out.lines.append(Line(((cut, high), (cut, low)), "cut"))
            self._text(cut, y - 0.1, f"breakpoint {cell.breakpoint}", SMALL, "cut", vertical="top")
        for label in cell.labels:
            at = top - 0.22
            role = "state" if label.kept else "plain"
            if label.near and not (last_in_row and cell.breakpoint is not None):
                self.out.lines.append(Line(((start, at), (end, at)), role, True))
            else:
                self.out.lines.append(Line(((start, at), (cut, at)), role))
            self._text(cut, at + 0.03, label.name, TEXT, role + " name", vertical="bottom", bold=True)
            for k, line in enumerate(label.lines):
                self._text(cut, at - 0.04 - (LINE - 0.02) * k, line, SMALL, "on cut", vertical="top")
            if last_in_row and label.near and cell.breakpoint is not None:
                self.out.lines.append(Line(((cut, at), (self._turn_x(index), at)), role))
            top -= self._label_height(len(label.lines))

    # ------------------------------------------------------------ long connections
    def _turn_x(self, index: int) -> float:
        row = index // self.columns
        number = len(self.picture.skips) + row
        return self.channel + LANE * self.beside[number]

    def _lane_y(self, row: int, number: int) -> float:
        return self.base[row] + self.box_height + 0.2 + LANE * self.above[row][number]

    def _turn(self, number: int, start: int, end: int) -> None:
        """From the end of a row to the left side of the next row's first stage."""
        near = [label for label in self.cells[start].labels if label.near]
        hidden = not self.cells[start].name or not self.cells[end].name
        if not near and not hidden:
            return
        role = "state" if any(label.kept for label in near) else "plain"
        x, y = self._corner(end)
        channel, lane = self._turn_x(start), self._lane_y(end // self.columns, number)
        at = self._turn_y(start)
        middle = y + self.box_height / 2
        edge = x - 0.3
        self.out.lines.append(
            Line(((channel, at), (channel, lane), (edge, lane), (edge, middle), (x, middle)), role, True)
        )

    def _turn_y(self, index: int) -> float:
        """Height of the first arrow that turns."""
        _, y = self._corner(index)
        labels = self.cells[index].labels
        total = sum(self._label_height(len(label.lines)) for label in labels)
        top = y + (self.box_height + total) / 2
        for label in labels:
            if label.near:
                return top - 0.22
            top -= self._label_height(len(label.lines))
        return y + self.box_height / 2

    def _skip(self, number: int, skip: Skip) -> None:
        x, y = self._corner(skip.start)
        row, target_row = skip.start // self.columns, skip.end // self.columns
        leave = x + self.box_width * (1 - 0.08 * (1 + self._order(skip, start=True)))
        enter_x, enter_y = self._corner(skip.end)
        enter = enter_x + self.box_width * 0.12 * (1 + self._order(skip, start=False))
        first, top = self._lane_y(row, number), y + self.box_height
        points = [(leave, top), (leave, first)]
        if row != target_row:
            beside, second = self.channel + LANE * self.beside[number], self._lane_y(target_row, number)
            points += [(beside, first), (beside, second), (enter, second)]
        else:
            points.append((enter, first))
        points.append((enter, enter_y + self.box_height))
        self.out.lines.append(Line(tuple(points), "skip", True))
        self._text(leave + 0.1, first, skip.name, SMALL, "skip name", horizontal="left")

    def _order(self, skip: Skip, *, start: bool) -> int:
        """Number of a skip among those that leave (or enter) the same stage."""
        same = [s for s in self.picture.skips if (s.start == skip.start if start else s.end == skip.end)]
        return min(same.index(skip), 7)


SUBTITLE = "widths, bytes and operations are of one example; dashed: breakpoints, where states are variables"


def _coloured(spans: Sequence[tuple[float, float, int]]) -> dict[int, int]:
    """A lane for each span, so that spans of one lane are apart; short spans lie lowest."""
    taken: list[list[tuple[float, float]]] = []
    found: dict[int, int] = {}
    for low, high, number in sorted(spans, key=lambda s: (s[1] - s[0], s[0])):
        lane = 0
        while lane < len(taken) and any(low <= b and a <= high for a, b in taken[lane]):
            lane += 1
        if lane == len(taken):
            taken.append([])
        taken[lane].append((low, high))
        found[number] = lane
    return found
