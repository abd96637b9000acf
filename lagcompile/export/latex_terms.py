"""Terms of a program in LaTeX: runs of equal constraints, transforms, couplings, schedules, regularisers.

In: `Symbols`. Out: lines of LaTeX mathematics. Invariant: three or more consecutive constraints that differ in their
number alone are written once, for a general k; no others are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lagcompile.ir.axes import Weight
from lagcompile.ir.program import DefectConstraint, Multiplier, StateVariable
from lagcompile.ir.symbols import Symbols, features
from lagcompile.ir.tex import number


@dataclass(frozen=True)
class Group:
    """A state, or a run of states whose lines are written once with a general k.

    Attributes:
        symbols: of the program.
        states: in order.
    """

    symbols: Symbols
    states: tuple[StateVariable, ...]

    @property
    def first(self) -> StateVariable:
        """What all states have in common except numbers."""
        return self.states[0]

    @property
    def last(self) -> StateVariable:
        """The last state."""
        return self.states[-1]

    @property
    def general(self) -> bool:
        """Whether it covers several states."""
        return len(self.states) > 1

    @property
    def span(self) -> str:
        """The range of k."""
        return rf"k = {self.first.breakpoint}, \dots, {self.last.breakpoint}"

    @property
    def constraint(self) -> DefectConstraint | None:
        """The defect constraint; None where the states are eliminated."""
        return self.symbols.program.defect_of(self.first.name)

    @property
    def multiplier(self) -> Multiplier | None:
        """The multiplier; None for a pure penalty."""
        return None if self.constraint is None else self.symbols.program.multiplier_of(self.constraint.name)

    @property
    def signed(self) -> bool:
        """Whether the multiplier cannot be negative."""
        return self.constraint is not None and self.constraint.relation == "<="

    @property
    def subscript(self) -> str:
        """Return k, or the number and name of the state."""
        if self.general:
            return "k"
        return self.symbols.bare(self.first.name).removeprefix("h_{").removesuffix("}")

    @property
    def class_index(self) -> str:
        """The class of a row."""
        return "(c)" if self.rows == "(c,n)" else "(y^{(i)})"

    def of(self, letter: str, index: str) -> str:
        """A letter with the group's subscript and an index."""
        return f"{letter}_{{{self.subscript}}}" + (f"^{{{index}}}" if index else "")

    def value(self) -> str:
        """The state."""
        return self.of("h", self.symbols.index(self.first.name))

    @property
    def rows(self) -> str:
        """Over what the defect runs: examples, unless the stage itself runs on samples."""
        stage = self.symbols.writer[self.first.name]
        if any(r in self.symbols.synthetic for r in stage.reads):
            return "(c,n)"
        return "(i)" if self.symbols.index(self.first.name) else ""

    def defect(self) -> str:
        """r_k."""
        return self.of("r", self.rows)

    def dual(self) -> str:
        """lambda_k with the index that its layout has."""
        multiplier = self.multiplier
        index = self.rows
        if multiplier is not None and multiplier.laid.rows == "class":
            index = self.class_index
        if multiplier is not None and multiplier.laid.rows == "all":
            index = ""
        return self.of(r"\lambda", index)

    def prediction(self) -> str:
        """The stage's value of the state."""
        stage = self.symbols.writer[self.first.name]
        if not self.general:
            return self.symbols.call(stage, self.first.name)
        before = f"h_{{k-1}}^{{{self.symbols.index(self.first.name)}}}"
        weights = r";\, \theta_{k-1}" if stage.weights else ""
        return rf"f_{{k-1}}\bigl({before}{weights}\bigr)"

    def definition(self) -> str:
        """Return the definition of the defect."""
        return self.first.storage.defect_tex(self.prediction(), self.value(), self.of, self.class_index)

    def range_of(self) -> str:
        """The range of k behind a line."""
        return rf", \quad {self.span}" if self.general else ""

    def features(self) -> str:
        """Number of features of a row."""
        shape = features(self.first.type)
        if shape is None:
            return f"d_{{{self.subscript}}}"
        total = 1
        for d in shape:
            total *= d
        return str(total)


def groups(symbols: Symbols) -> list[Group]:
    """States in order, runs of three or more alike joined."""
    runs: list[list[StateVariable]] = []
    for state in symbols.program.states:
        if runs and _continues(symbols, runs[-1][-1], state):
            runs[-1].append(state)
        else:
            runs.append([state])
    found: list[Group] = []
    for run in runs:
        if len(run) > 2:
            found.append(Group(symbols, tuple(run)))
        else:
            found += [Group(symbols, (s,)) for s in run]
    return found


def _continues(symbols: Symbols, before: StateVariable, state: StateVariable) -> bool:
    """Whether a state is the next of a chain of equals: it is made from the one before it and from nothing else."""
    if state.breakpoint != before.breakpoint + 1 or "." in state.name or "." in before.name:
        return False
    mine, theirs = symbols.writer[state.name], symbols.writer[before.name]
    chained = mine.reads == (before.name,) and len(mine.writes) == 1 and _single_chain(symbols, before)
    return (
        chained
        and bool(mine.weights) == bool(theirs.weights)
        and symbols.program.formulation_of(before) == symbols.program.formulation_of(state)
        and not before.storage.sampled
    )


def _single_chain(symbols: Symbols, state: StateVariable) -> bool:
    """Return whether the state's stage reads only the state before it."""
    stage = symbols.writer[state.name]
    names = {s.name: s for s in symbols.program.states}
    return (
        len(stage.writes) == 1
        and len(stage.reads) == 1
        and stage.reads[0] in names
        and names[stage.reads[0]].breakpoint == state.breakpoint - 1
        and "." not in stage.reads[0]
    )


def definitions(symbols: Symbols) -> list[str]:
    """Explain operators and maps, each once."""
    found = [m for m in dict.fromkeys(c.transform.meaning for c in symbols.program.defects) if m]
    found += [m for m in dict.fromkeys(s.domain.meaning for s in symbols.variables()) if m]
    found += [m for m in dict.fromkeys(s.storage.meaning for s in symbols.program.states) if m]
    return found


# ---------------------------------------------------------------- quadratic weights
def weight_lines(symbols: Symbols) -> list[str]:
    """The quadratic weights: one number where all agree, else by breakpoint."""
    common = _common_weight(symbols)
    if common is not None:
        return [common.tex(r"\rho")]
    weights = [(g, g.constraint.weight) for g in groups(symbols) if g.constraint is not None]
    return [w.tex(g.of(r"\rho", "")) + (f" for ${g.span}$" if g.general else "") for g, w in weights if w is not None]


def _common_weight(symbols: Symbols) -> Weight | None:
    """The quadratic weight of all defects; None where they differ or have none."""
    weights = [c.weight for c in symbols.program.defects]
    return weights[0] if weights and all(w == weights[0] for w in weights) else None


# ---------------------------------------------------------------- couplings
def coupling_lines(symbols: Symbols) -> list[str]:
    """Terms that the Lagrangian has besides the objective, one for each constraint or run of them."""
    lines = [_coupling(symbols, g) for g in groups(symbols) if g.constraint is not None]
    return [line for line in lines if line] + list(_values(symbols))


def _coupling(symbols: Symbols, group: Group) -> str:
    constraint, multiplier = group.constraint, group.multiplier
    assert constraint is not None
    rho = r"\rho" if _common_weight(symbols) is not None else group.of(r"\rho", "")
    augmented = constraint.weight is not None and constraint.weight.augmented
    if constraint.weight is not None and constraint.weight.scheduled:
        rho += "^{(t)}"
    g, squared = constraint.transform.tex(group.defect()), group.defect()
    if augmented:
        g = squared = group.of("g", group.rows)
    parts = []
    if multiplier is not None:
        dual = group.dual()
        if multiplier.laid.per_feature and not constraint.transform.per_row:
            parts.append(rf"\bigl\langle {dual},\, {g} \bigr\rangle")
        elif constraint.transform.per_row:
            parts.append(rf"{dual}\, {g}")
        else:
            parts.append(rf"{dual}\, \mathbf{{1}}^{{\top}} {g}")
    if constraint.weight is not None:
        parts.append(rf"\frac{{{rho}}}{{2}} \bigl\lVert {squared} \bigr\rVert^2")
    if not parts:
        return ""
    inner = " + ".join(parts)
    if constraint.features == "mean":
        inner = rf"\frac{{1}}{{{group.features()}}} " + (inner if len(parts) == 1 else rf"\Bigl[ {inner} \Bigr]")
    elif len(parts) > 1:
        inner = rf"\Bigl[ {inner} \Bigr]"
    outer = rf"\sum_{{k={group.first.breakpoint}}}^{{{group.last.breakpoint}}} " if group.general else ""
    line = _rows(symbols, group) + outer + inner
    if augmented:
        line += rf", \qquad {g} = {constraint.transform.tex_excess(group.defect(), group.dual(), rho)}"
    return line


def _rows(symbols: Symbols, group: Group) -> str:
    mean = symbols.program.objective.reduction == "mean"
    if group.rows == "(c,n)":
        return (r"\frac{1}{M S} " if mean else "") + r"\sum_{c=1}^{M} \sum_{n=1}^{S} "
    if not group.rows:
        return ""
    return (r"\frac{1}{B} " if mean else "") + r"\sum_{i=1}^{B} "


def _values(symbols: Symbols) -> Iterator[str]:
    """Multipliers of the user's constraints."""
    for constraint in symbols.program.constraints:
        multiplier = symbols.program.multiplier_of(constraint.name)
        if constraint.kind == "value" and multiplier is not None:
            name = constraint.name.replace("_", r"\_")
            yield rf"\bigl\langle \lambda_{{\mathrm{{{name}}}}},\, c_{{\mathrm{{{name}}}}} \bigr\rangle"


def regularisers(symbols: Symbols, batch: str) -> str:
    """Regularisers as further terms of the objective."""
    found = ""
    mean = symbols.program.objective.reduction == "mean"
    for term in symbols.program.objective.regularisers:
        scale = number(term.weight)
        norm = r"\lVert {} \rVert_1" if term.kind == "l1" else r"\lVert {} \rVert_2^2"
        if term.kind == "l2":
            scale = rf"\frac{{{scale}}}{{2}}"
        if term.on == "weights":
            found += rf" + {scale} {norm.replace('{}', chr(92) + 'theta')}"
        else:
            over = rf"\frac{{1}}{{{batch}}} \sum_{{i=1}}^{{{batch}}} " if mean else rf"\sum_{{i=1}}^{{{batch}}} "
            found += rf" + {scale} {over}\sum_{{k}} {norm.replace('{}', 'h_k^{(i)}')}"
    return found
