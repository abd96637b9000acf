"""The constrained program: variables, stages, constraints, multipliers, objective. Plain data, no torch.

In: what `frontend/lower.py` finds. Out: `Program`, which `ir/text.py` prints and every backend reads. Invariant: a
program that exists is consistent (`problems_of` is empty); all names are unique and every reference resolves.

The mathematics, with stages f_0..f_K and states h_k (sum over examples i of the batch, c = 1/batch for `mean`):

    L = objective + c sum_i [ sum_k <lambda_k,i, G(r_k,i)> + (rho_k/2) |r_k,i|^2 ],    r_k = f_{k-1}(.) - h_k

so that at a zero-defect stationary point lambda_k,i is the adjoint d objective_i / d h_k,i.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Final, Literal, TypeVar

from pydantic import Field, model_validator

from lagcompile.ir.axes import LAYOUTS, Layout, LayoutName, Start, Weight
from lagcompile.ir.base import Frozen, ProgramError
from lagcompile.ir.domains import Domain, Free
from lagcompile.ir.storages import Storage
from lagcompile.ir.transforms import Transform

FORMAT: Final = 2
"""Of JSON and YAML files; in format 1 every entry stood by itself."""


class TensorType(Frozen):
    """Type of one tensor. `shape` holds the full shape with 'B' where the batch axis is; None until data are bound."""

    dtype: str = "float32"
    shape: tuple[int | str, ...] | None = None

    @property
    def features(self) -> tuple[int, ...] | None:
        """Shape of one example: the full shape without its batch axis."""
        return None if self.shape is None else tuple(d for d in self.shape if isinstance(d, int))

    @property
    def count(self) -> int | None:
        """Numbers in one example; a batch axis "16B" holds 16 of each."""
        if self.shape is None:
            return None
        total = 1
        for d in self.shape:
            total *= d if isinstance(d, int) else int(d.removesuffix("B")) if d.removesuffix("B").isdigit() else 1
        return total

    def __str__(self) -> str:
        return f"{self.dtype}[{'?' if self.shape is None else ', '.join(map(str, self.shape))}]"


class DataVariable(Frozen):
    """A value that comes with the data: an input of the network, or what follows from inputs alone."""

    name: str
    type: TensorType
    free: bool = False
    """Whether the input is solved for (state estimation)."""
    lower: float | None = None
    upper: float | None = None


class WeightVariable(Frozen):
    """A parameter of the network, one variable however many stages read it."""

    name: str
    """The name in the user's state_dict."""
    type: TensorType
    trainable: bool = True
    aliases: tuple[str, ...] = ()
    """Further names of the same tensor in the user's model (tied weights)."""


class StateVariable(Frozen):
    """The value of one tensor at a breakpoint, as a variable."""

    name: str
    breakpoint: int
    """Number of the breakpoint at which the tensor leaves its stage, from 1."""
    node: str
    """Graph node that makes the tensor."""
    module: str
    """Module path of that node in the user's model."""
    type: TensorType
    storage: Storage
    domain: Domain = Free()
    start: Start


class Stage(Frozen):
    """A sub-network between breakpoints: reads data and states, writes states and outputs."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    """Module paths that run in this stage."""
    flops: int = 0
    signature: str = ""
    """Equal for stages that compute the same function of their inputs and weights."""


class DefectConstraint(Frozen):
    """G(f(.) - h) = 0 (or <= 0) for one state."""

    kind: Literal["defect"] = "defect"
    name: str
    state: str
    stage: str
    transform: Transform
    relation: Literal["==", "<="] = "=="
    scaled: Literal["no", "class_sigma"] = "no"
    """class_sigma: the defect is divided by the class's standard deviation (a z-score)."""
    weight: Weight | None = None
    """rho: weight of (rho/2)|r|^2 on the raw (scaled) defect; None for no quadratic term."""
    features: Literal["sum", "mean"] = "sum"
    """Reduction over features."""


class ValueConstraint(Frozen):
    """A constraint that the user adds: bounds, or a function of named values that must be == 0 or <= 0."""

    kind: Literal["value"] = "value"
    name: str
    reads: tuple[str, ...]
    function: str | None = None
    """module:attribute of a torch function of the named values; None where there are bounds only."""
    relation: Literal["==", "<="] = "<="
    lower: float | None = None
    upper: float | None = None
    weight: Weight | None = None


Constraint = Annotated[DefectConstraint | ValueConstraint, Field(discriminator="kind")]


class Multiplier(Frozen):
    """The dual variable of one constraint."""

    name: str
    constraint: str
    layout: LayoutName = "full"
    start: Literal["zero", "adjoint"] = "zero"

    @property
    def laid(self) -> Layout:
        """Return the record of the layout."""
        return LAYOUTS[self.layout]


class Regulariser(Frozen):
    """weight * |values|_1 or weight/2 * |values|_2^2."""

    kind: Literal["l1", "l2"]
    on: Literal["weights", "states"]
    weight: float = Field(gt=0)


class Objective(Frozen):
    """What is minimised."""

    loss: str
    """Name of the loss, a function (output, target) -> scalar."""
    reads: tuple[str, ...]
    reduction: Literal["mean", "sum"] = "mean"
    """How the loss reduces over examples; the coupling terms follow it."""
    regularisers: tuple[Regulariser, ...] = ()


class Program(Frozen):
    """A network as a constrained program. `print(program)` shows it; `ir.text` stores it as JSON or YAML."""

    FILE = ("program", "stages", "objective")
    format: Literal[2] = FORMAT
    name: str = "program"
    data: tuple[DataVariable, ...]
    weights: tuple[WeightVariable, ...]
    states: tuple[StateVariable, ...]
    stages: tuple[Stage, ...]
    constraints: tuple[Constraint, ...]
    multipliers: tuple[Multiplier, ...]
    objective: Objective
    classes: int | None = None
    """Number of classes, where a state or a multiplier is kept per class."""

    @model_validator(mode="after")
    def _consistent(self) -> Program:
        problems = tuple(problems_of(self))
        if problems:
            raise ProgramError(problems)
        return self

    def __str__(self) -> str:
        from lagcompile.ir.text import to_text

        return to_text(self)

    def state(self, name: str) -> StateVariable:
        """Return a state by its name.

        Raises:
            ProgramError: there is no such state.
        """
        return _by_name(self.states, name, "state")

    def stage(self, name: str) -> Stage:
        """Return a stage by its name.

        Raises:
            ProgramError: there is no such stage.
        """
        return _by_name(self.stages, name, "stage")

    def defect_of(self, state: str) -> DefectConstraint | None:
        """Return the defect constraint of a state; None where it is eliminated."""
        return next((c for c in self.defects if c.state == state), None)

    def multiplier_of(self, constraint: str) -> Multiplier | None:
        """Return the multiplier of a constraint; None where the constraint is a pure penalty."""
        return next((m for m in self.multipliers if m.constraint == constraint), None)

    def formulation_of(self, state: StateVariable) -> tuple[object, ...]:
        """Return what is said of a state besides names and places; equal for states that are treated alike."""
        c = self.defect_of(state.name)
        own = (state.type, state.storage, state.domain, state.start)
        if c is None:
            return own
        multiplier = self.multiplier_of(c.name)
        dual = None if multiplier is None else (multiplier.layout, multiplier.start)
        return (*own, c.transform, c.relation, c.weight, c.features, dual)

    def requires(self, constraint: ValueConstraint) -> bool:
        """Return whether a value constraint must hold; with a weight and no multiplier it is a penalty."""
        return constraint.weight is None or self.multiplier_of(constraint.name) is not None

    def narrowed(self, name: str, low: float, high: float) -> tuple[float, float]:
        """Return the bounds of a variable, narrowed by the user's bounds on it."""
        for c in self.constraints:
            if isinstance(c, ValueConstraint) and c.function is None and name in c.reads and self.requires(c):
                low = low if c.lower is None else max(low, c.lower)
                high = high if c.upper is None else min(high, c.upper)
        return low, high

    @property
    def defects(self) -> tuple[DefectConstraint, ...]:
        """The defect constraints, in the order of their states."""
        return tuple(c for c in self.constraints if isinstance(c, DefectConstraint))


Named = TypeVar("Named", StateVariable, Stage)


def _by_name(items: tuple[Named, ...], name: str, what: str) -> Named:
    for item in items:
        if item.name == name:
            return item
    known = ", ".join(i.name for i in items) or "none"
    raise ProgramError(f"the program has no {what} '{name}' (it has: {known})")


def _duplicates(kind: str, names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"the {kind} name '{name}' is used twice"
        seen.add(name)


def problems_of(program: Program) -> Iterator[str]:
    """Every inconsistency of a program, one sentence each (the verifier that passes run before and after)."""
    states = {s.name: s for s in program.states}
    data = {d.name for d in program.data}
    weights = {w.name for w in program.weights}
    stages = {s.name: s for s in program.stages}
    constraints = {c.name for c in program.constraints}
    yield from _duplicates("state", (s.name for s in program.states))
    yield from _duplicates("data", (d.name for d in program.data))
    yield from _duplicates("weight", (w.name for w in program.weights))
    yield from _duplicates("stage", (s.name for s in program.stages))
    yield from _duplicates("constraint", (c.name for c in program.constraints))
    yield from _duplicates("multiplier", (m.name for m in program.multipliers))
    written: dict[str, str] = {}
    for stage in program.stages:
        for name in stage.reads:
            if name not in data and name not in states:
                yield f"stage '{stage.name}' reads '{name}', which is neither data nor a state"
            elif name in states and name not in written:
                yield f"stage '{stage.name}' reads the state '{name}' before any stage writes it"
        for name in stage.weights:
            if name not in weights:
                yield f"stage '{stage.name}' reads the weight '{name}', which the program does not have"
        for name in stage.writes:
            if name in written:
                yield f"'{name}' is written by stage '{written[name]}' and again by stage '{stage.name}'"
            written[name] = stage.name
    for name in states:
        if name not in written:
            yield f"no stage writes the state '{name}'"
    yield from _constraint_problems(program, states, stages, data | weights | set(written))
    for multiplier in program.multipliers:
        if multiplier.constraint not in constraints:
            yield f"multiplier '{multiplier.name}' belongs to no constraint ('{multiplier.constraint}')"
    for name in program.objective.reads:
        if name not in written and name not in data:
            yield f"the objective reads '{name}', which nothing writes"


def _constraint_problems(
    program: Program, states: dict[str, StateVariable], stages: dict[str, Stage], values: set[str]
) -> Iterator[str]:
    constrained: set[str] = set()
    multipliers = {m.constraint: m for m in program.multipliers}
    for c in program.constraints:
        if isinstance(c, DefectConstraint):
            if c.state not in states:
                yield f"constraint '{c.name}' is on the state '{c.state}', which the program does not have"
                continue
            if c.stage not in stages or c.state not in stages[c.stage].writes:
                yield f"constraint '{c.name}': stage '{c.stage}' does not write '{c.state}'"
            storage = states[c.state].storage
            if not storage.variable:
                yield f"constraint '{c.name}' is on the state '{c.state}', which is eliminated"
            if c.scaled != storage.scaled:
                yield f"constraint '{c.name}': a defect is a z-score exactly where its state is class_gaussian"
            multiplier = multipliers.get(c.name)
            if c.transform.per_row and multiplier is not None and multiplier.laid.per_feature:
                yield (
                    f"constraint '{c.name}': {c.transform.kind} gives one number per example, its multiplier must be "
                    "'example' or 'scalar'"
                )
            yield from _augmented_problems(c, multiplier)
            constrained.add(c.state)
        else:
            for name in c.reads:
                if name not in values:
                    yield f"constraint '{c.name}' reads '{name}', which nothing writes"
            if c.weight is not None and c.weight.augmented:
                yield f"constraint '{c.name}': a weight of kind augmented is for defects; here give kind constant"
    for name, state in states.items():
        if state.storage.variable and name not in constrained:
            yield f"the state '{name}' has no defect constraint"
    per_class = [f"the state {s.name} ({s.module})" for s in program.states if s.storage.per_class]
    per_class += [f"the multiplier {m.name}" for m in program.multipliers if m.laid.rows == "class"]
    if per_class and program.classes is None:
        yield (
            f"{', '.join(per_class)}: kept per class, but the number of classes is not given: write 'classes: 10', or "
            "'storage: {kind: table}' for data without classes"
        )


def _augmented_problems(c: DefectConstraint, multiplier: Multiplier | None) -> Iterator[str]:
    """Why a tube has no augmented Lagrangian with one multiplier for each inequality."""
    if c.weight is None or not c.weight.augmented:
        return
    here = f"constraint '{c.name}': a weight of kind augmented"
    needed = "example" if c.transform.per_row else "full"
    if multiplier is None:
        yield f"{here} needs a multiplier; for a pure penalty give kind constant"
    elif multiplier.layout != needed:
        yield f"{here} needs one multiplier for each inequality: lay it out '{needed}' instead of '{multiplier.layout}'"
    if not c.transform.augmentable or c.relation == "<=":
        what = c.transform.kind if c.relation == "==" else "a one-sided inequality"
        yield f"{here} is for identity and tubes (softshrink, hardshrink, abs_tube, norm_tube), not for {what}"
