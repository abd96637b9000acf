"""Symbols of a program for LaTeX: names, sets, dimensions, numbers, and over what each value runs.

In: a `Program`. Out: strings of LaTeX mathematics. Invariant: a value has one symbol, h_k for the state at breakpoint
k, lambda_k for its multiplier, r_k for its defect, theta_k for the weights that stage f_k reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lagcompile.ir.domains import Domain
from lagcompile.ir.program import Program, Stage, StateVariable, TensorType
from lagcompile.ir.sampling import sampled
from lagcompile.ir.tex import number

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "_%&#${}"},
}
_STATE = re.compile(r"^h(?P<number>\d+)(\.(?P<node>.+))?$")


def text(name: str) -> str:
    """A name in text, special characters escaped."""
    return "".join(_SPECIAL.get(c, c) for c in name)


def code(name: str) -> str:
    r"""A name of the user's, in \texttt."""
    return rf"\texttt{{{text(name)}}}"


def count(value: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", r"\,")


class Symbols:
    """Symbols of one program's values."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.states = {s.name: s for s in program.states}
        unknown = None if shapes_known(program) else TensorType()
        self.data = {d.name: unknown or d.type for d in program.data}
        self.synthetic = sampled(program).values
        self.writer = {w: s for s in program.stages for w in s.writes}

    # ---------------------------------------------------------------- values
    def index(self, name: str) -> str:
        """Over what a value runs: examples, samples of classes, or nothing."""
        state = self.states.get(name)
        if state is not None and state.storage.single:
            return ""
        if name in self.data and not _per_example(self.data[name]):
            return ""
        return "(c,n)" if name in self.synthetic else "(i)"

    def value(self, name: str) -> str:
        """Symbol of a value with its index."""
        index = self.index(name)
        return self.bare(name) + (f"^{{{index}}}" if index else "")

    def bare(self, name: str) -> str:
        """Symbol of a value without its index."""
        match = _STATE.match(name)
        if name in self.states and match is not None:
            return f"h_{{{self._subscript(match['number'], match['node'])}}}"
        if name in self.data:
            if re.fullmatch("[a-z]", name) or len(self.data) == 1:
                return name if len(name) == 1 else "x"
            return rf"\mathit{{{text(name)}}}"
        return r"\hat{y}" if self.program.objective.reads == (name,) else rf"\hat{{y}}_{{\mathrm{{{text(name)}}}}}"

    def _subscript(self, number: str, node: str | None) -> str:
        return number if node is None else rf"{number},\mathrm{{{text(node)}}}"

    # ---------------------------------------------------------------- stages
    def function(self, stage: Stage, write: str | None = None) -> str:
        """f_k, or the component of f_k that gives one of several values."""
        k = stage.name.removeprefix("f")
        if write is None or len(stage.writes) == 1:
            return f"f_{{{k}}}"
        node = self.states[write].node if write in self.states else write
        return rf"f_{{{k}}}^{{\mathrm{{{text(node)}}}}}"

    def weights(self, stage: Stage) -> str:
        """theta_k; empty where a stage reads none."""
        return f"\\theta_{{{stage.name.removeprefix('f')}}}" if stage.weights else ""

    def call(self, stage: Stage, write: str | None = None, reads: Sequence[str] | None = None) -> str:
        """The stage applied to what it reads."""
        names = [self.value(r) for r in stage.reads] if reads is None else list(reads)
        weights = self.weights(stage)
        inner = ", ".join(names) + (f";\\, {weights}" if weights and names else weights)
        return rf"{self.function(stage, write)}\bigl({inner}\bigr)"

    # ---------------------------------------------------------------- sets
    def set_of(self, state: StateVariable) -> str:
        """The set in which a state lies."""
        return space(state.type, state.domain)

    def variables(self) -> list[StateVariable]:
        """States that are variables."""
        return [s for s in self.program.states if s.storage.variable]

    # ---------------------------------------------------------------- a method's step
    def moved(self) -> str:
        """What moves besides weights and multipliers: states, the parts that are kept of them, free inputs."""
        names = dict.fromkeys(letter for s in self.variables() for letter in s.storage.letters)
        return ", ".join([*names, *(self.bare(d.name) for d in self.program.data if d.free)])

    def projection(self) -> tuple[str, str]:
        """Symbol and sentence of the projection behind a step; empty where nothing is projected."""
        if any(s.domain.projected for s in self.variables()):
            return r"\Pi\bigl(", r" $\Pi$ projects states onto their sets."
        if any(c.relation == "<=" for c in self.program.defects):
            return r"\Pi\bigl(", r" $\Pi$ keeps multipliers of inequalities $\ge 0$."
        return "", ""


def shapes_known(program: Program) -> bool:
    """Whether the program was lifted with inputs: without them its types and costs say nothing."""
    return all(s.type.shape is not None for s in program.states) and any(d.type.shape for d in program.data)


def features(kind: TensorType) -> tuple[int, ...] | None:
    """Shape of one example; an axis that holds several entries an example counts them."""
    if kind.shape is None:
        return None
    found: list[int] = []
    for d in kind.shape:
        if isinstance(d, int):
            found.append(d)
        elif d.removesuffix("B"):
            found.append(int(d.removesuffix("B")))
    return tuple(found)


def _per_example(kind: TensorType) -> bool:
    """Whether a value has a batch axis, as far as is known."""
    return kind.shape is None or any(isinstance(d, str) for d in kind.shape)


def dimension(kind: TensorType) -> str:
    """Dimension of one example: 64, 16 x 8 x 8, d where it is not known."""
    shape = features(kind)
    if shape is None:
        return "d"
    return r" \times ".join(map(str, shape)) if shape else "1"


def space(kind: TensorType, domain: Domain | None = None) -> str:
    """R^d, R_{>= 0}^d or [a, b]^d."""
    power = dimension(kind)
    above = "" if power == "1" else f"^{{{power}}}"
    if domain is not None and domain.bounded:
        return domain.tex(above)
    if kind.dtype == "bool":
        return rf"\{{0, 1\}}{above}"
    return (r"\mathbb{Z}" if "int" in kind.dtype else r"\mathbb{R}") + above


def between(lower: float | None, inner: str, upper: float | None) -> str:
    """A value between the bounds that there are."""
    low = "" if lower is None else rf"{{{number(lower)}}} \le "
    high = "" if upper is None else rf" \le {number(upper)}"
    return f"{low}{inner}{high}"
