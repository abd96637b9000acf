"""Backends side by side on one small program: what `lagcompile verify --exact SPEC` runs.

In: a `Prepared` spec, or an instance. Out: `Comparison`: one row for each backend, with certificates. Invariant: every
residual in the table is measured by `check.kkt`, never taken from a backend; backends that are not installed are
named as such.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from lagcompile.backends.base import RunOptions
from lagcompile.backends.method import Solver
from lagcompile.backends.sqp import SQP
from lagcompile.backends.sqp_oracle import Ipopt
from lagcompile.check.agreement import Distance, distance
from lagcompile.check.certificate import Certificate, largest
from lagcompile.check.kkt import certify_kkt, objective
from lagcompile.ir.base import MissingExtraError, ProgramError
from lagcompile.ir.solution import Solution
from lagcompile.runtime.instance import Instance
from lagcompile.workbench.prepare import Prepared, placing
from lagcompile.workbench.progress import Display

LARGEST = 5000
"""Variables above which an exact comparison is refused."""
EXACT = ("sqp", "convex", "mixed_integer", "ipopt")
"""Backends whose certificate counts, in this order."""


@dataclass(frozen=True)
class Line:
    """One backend's row.

    Attributes:
        backend: its name.
        status: how its run ended.
        objective: the program's objective, without multipliers.
        primal: largest primal residual of the certificate.
        dual: largest of the others.
        against: the row whose solution the distance is measured from; empty for the reference itself.
        distance: from that solution.
        seconds: wall time.
        note: why there is no result, or the backend's message.
    """

    backend: str
    status: str
    objective: float
    primal: float
    dual: float
    against: str
    distance: Distance | None
    seconds: float
    note: str


@dataclass(frozen=True)
class Comparison:
    """The table, with what is behind it."""

    lines: tuple[Line, ...]
    solutions: Mapping[str, Solution] = field(default_factory=dict)
    certificates: Mapping[str, Certificate] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the exact backend's certificate holds: SQP's, or a global solver's where SQP refuses."""
        found = self.exact
        return found is not None and found.ok

    @property
    def exact(self) -> Certificate | None:
        """The certificate of the first exact backend that gave a solution."""
        return next((self.certificates[n] for n in EXACT if n in self.certificates), None)

    def __str__(self) -> str:
        head = ("backend", "status", "objective", "primal", "dual", "from", "d primal", "d multipliers", "seconds", "")
        rows = [head, *(_cells(line) for line in self.lines)]
        widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
        table = ["  ".join(c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in _numbered(r, widths)) for r in rows]
        facts = () if self.exact is None else (*self.exact.unassessed, *self.exact.facts)
        return "\n".join([*(line.rstrip() for line in table), *(f"  {fact}" for fact in facts)])


def _numbered(row: Sequence[str], widths: Sequence[int]) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(zip(row, widths, strict=True)))


def _cells(line: Line) -> tuple[str, ...]:
    far = line.distance
    return (
        line.backend,
        line.status,
        f"{line.objective:.8g}",
        f"{line.primal:.1e}",
        f"{line.dual:.1e}",
        line.against or "-",
        "-" if far is None else f"{far.primal:.1e}",
        "-" if far is None else f"{far.multipliers:.1e}",
        f"{line.seconds:.2f}",
        line.note,
    )


@dataclass
class _Table:
    """Rows being made; each backend starts from the instance's first weights."""

    instance: Instance
    original: nn.Module
    display: Display | None = None
    lines: list[Line] = field(default_factory=list)
    solutions: dict[str, Solution] = field(default_factory=dict)
    certificates: dict[str, Certificate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._initial = {n: v.detach().clone() for n, v in self.instance.module.state_dict().items()}

    def reset(self) -> None:
        """Put the weights back."""
        self.instance.module.load_state_dict(self._initial)
        self.instance.weights.adopt()

    def add(self, name: str, backend: Solver, options: RunOptions, start: Solution | None, against: str) -> None:
        """Solve, certify, and compare with another row where that has a solution."""
        self.reset()
        watch = None
        if self.display is not None:
            self.display.begin(name)
            watch = partial(self.display.look, name, options.steps)
        begin, nan = time.perf_counter(), float("nan")
        try:
            solution = backend.solve(self.instance, options, original=self.original, watch=watch, start=start)
        except (MissingExtraError, ProgramError) as error:
            seconds = time.perf_counter() - begin
            more = len(error.problems) - 1
            note = error.problems[0] + (f" (and {more} more)" if more else "")
            self.lines.append(Line(name, "no result", nan, nan, nan, "", None, seconds, note))
            return
        seconds = time.perf_counter() - begin
        self.reset()
        certificate = certify_kkt(self.instance, solution)
        primal = [r.value for r in certificate.residuals if r.kind == "primal feasibility"]
        rest = [r.value for r in certificate.residuals if r.kind != "primal feasibility"]
        other = self.solutions.get(against)
        self.lines.append(
            Line(
                backend=name,
                status=solution.status.name.lower(),
                objective=objective(self.instance, solution),
                primal=largest(primal),
                dual=largest(rest),
                against=against if other is not None else "",
                distance=None if other is None else distance(other, solution),
                seconds=seconds,
                note=str(solution.details.get("message", "")),
            )
        )
        self.solutions[name], self.certificates[name] = solution, certificate


def compare(
    instance: Instance,
    backends: Mapping[str, Solver],
    options: RunOptions,
    *,
    original: nn.Module,
    start: Solution | None = None,
    display: Display | None = None,
) -> Comparison:
    """Solve an instance by several backends; the first is the reference.

    A step-wise method may end near another minimum than the reference (hidden units permuted, or with other signs): the
    reference is run once more from its solution, and the distance between the two is the method's error.

    Args:
        instance: the bound program; each backend gets a fresh copy of its weights.
        backends: by the name in the table.
        options: of step-wise methods.
        original: the user's module.
        start: a common start.
        display: shows the rows of each solve on the way.
    """
    table = _Table(instance, original, display)
    reference = next(iter(backends))
    for name, backend in backends.items():
        table.add(name, backend, options, start, reference if name != reference else "")
        if backend.stepwise and name in table.solutions:
            table.add(f"{reference} from {name}", backends[reference], options, table.solutions[name], name)
    table.reset()
    return Comparison(tuple(table.lines), table.solutions, table.certificates)


def verify_exact(prepared: Prepared, *, examples: int | None = None, display: Display | None = None) -> Comparison:
    """Solve a spec's program by SQP, by IPOPT where CasADi is installed, and by the spec's own method.

    Args:
        prepared: the spec, its data and its module.
        examples: use only the first training examples.
        display: shows the rows of each solve on the way.

    Raises:
        SpecError: data, loss and program do not fit each other, or the program has more than `LARGEST` variables: the
            message says how many examples would fit.
    """
    loaded, data = prepared.loaded, prepared.data
    x, y = data.train_x[:examples], data.train_y[:examples]
    with placing(loaded), loaded.importing():
        instance = prepared.lifted.bind((x, y), loss=loaded.loss)
        _refuse_large(instance)
        method = loaded.spec.method
        kinks = getattr(method, "kinks", "refuse")
        backends: dict[str, Solver] = {"sqp": SQP(), "ipopt": Ipopt(kinks=kinks)}
        backends[method.kind] = method  # of kind sqp or ipopt: with the spec's options
        options = loaded.spec.run.options()
        return compare(instance, backends, options, original=prepared.model, display=display)


def _refuse_large(instance: Instance) -> None:
    program = instance.program
    fixed = sum(w.type.count or 0 for w in program.weights if w.trainable)
    each = sum(s.type.count or 0 for s in program.states if s.storage.variable)
    count = fixed + each * instance.examples
    if count > LARGEST:
        room = (LARGEST - fixed) // max(each, 1)
        remedy = f"at most {room} examples fit (--examples {room})" if room > 0 else "it fits with no example at all"
        raise ProgramError(
            f"the exact program has {count:,} variables ({fixed:,} weights, {each:,} states for each of "
            f"{instance.examples:,} examples), more than {LARGEST:,}: {remedy}"
        )
