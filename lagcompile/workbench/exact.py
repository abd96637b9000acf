"""Backends side by side on one small program: what `lagcompile verify --exact SPEC` runs.

In: a `Prepared` spec, or an instance. Out: `Comparison`: one row for each backend, with certificates. Invariant: every
residual in the table is measured by `check.kkt`, none is a backend's own word; backends that are not installed are
named as such.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lagcompile.backends.base import RunOptions, Solver
from lagcompile.backends.sqp import SQP
from lagcompile.backends.sqp_oracle import Ipopt
from lagcompile.check.agreement import Distance, distance
from lagcompile.check.certificate import Certificate
from lagcompile.check.kkt import certify_kkt, objective
from lagcompile.ir.base import MissingExtraError, ProgramError
from lagcompile.ir.solution import Solution
from lagcompile.runtime.instance import Instance
from lagcompile.workbench.prepare import Prepared, placing

LARGEST = 5000
"""Variables above which an exact comparison is refused."""


@dataclass(frozen=True)
class Line:
    """One backend's row.

    Attributes:
        backend: its name.
        status: how its run ended.
        objective: the program's objective, without multipliers.
        primal: largest primal residual of the certificate.
        dual: largest of the others.
        distance: from the reference backend's solution; None for the reference itself.
        seconds: wall time.
        note: why there is no result, or the backend's message.
    """

    backend: str
    status: str
    objective: float
    primal: float
    dual: float
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
        """Whether the exact backend's certificate holds."""
        return "sqp" in self.certificates and self.certificates["sqp"].ok

    def __str__(self) -> str:
        head = ("backend", "status", "objective", "primal", "dual", "d primal", "d multipliers", "seconds", "")
        rows = [head, *(_cells(line) for line in self.lines)]
        widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
        table = ["  ".join(c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in _numbered(r, widths)) for r in rows]
        facts = self.certificates["sqp"].facts if "sqp" in self.certificates else ()
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
        "-" if far is None else f"{far.primal:.1e}",
        "-" if far is None else f"{far.multipliers:.1e}",
        f"{line.seconds:.2f}",
        line.note,
    )


def compare(
    instance: Instance,
    backends: Mapping[str, Solver],
    options: RunOptions,
    *,
    original: nn.Module,
    start: Solution | None = None,
) -> Comparison:
    """Solve an instance by several backends; the first is the reference.

    Args:
        instance: the bound program; each backend gets a fresh copy of its weights.
        backends: by the name in the table.
        options: of step-wise methods.
        original: the user's module.
        start: a common start.
    """
    lines: list[Line] = []
    solutions: dict[str, Solution] = {}
    certificates: dict[str, Certificate] = {}
    initial = {n: v.detach().clone() for n, v in instance.module.state_dict().items()}
    for name, backend in backends.items():
        instance.module.load_state_dict(initial)
        instance.weights.adopt()
        begin = time.perf_counter()
        nan = float("nan")
        try:
            solution = backend.solve(instance, options, original=original, start=start)
        except (MissingExtraError, ProgramError) as error:
            lines.append(Line(name, "no result", nan, nan, nan, None, time.perf_counter() - begin, str(error)))
            continue
        seconds = time.perf_counter() - begin
        instance.module.load_state_dict(initial)
        instance.weights.adopt()
        certificate = certify_kkt(instance, solution)
        primal = [r.value for r in certificate.residuals if r.kind == "primal feasibility"]
        rest = [r.value for r in certificate.residuals if r.kind != "primal feasibility"]
        lines.append(
            Line(
                backend=name,
                status=solution.status.name.lower(),
                objective=objective(instance, solution),
                primal=max(primal, default=0.0),
                dual=max(rest, default=0.0),
                distance=distance(next(iter(solutions.values())), solution) if solutions else None,
                seconds=seconds,
                note=str(solution.details.get("message", "")),
            )
        )
        solutions[name], certificates[name] = solution, certificate
    instance.module.load_state_dict(initial)
    instance.weights.adopt()
    return Comparison(tuple(lines), solutions, certificates)


def verify_exact(prepared: Prepared, *, examples: int | None = None) -> Comparison:
    """Solve a spec's program by SQP, by IPOPT where CasADi is installed, and by the spec's own method.

    Args:
        prepared: the spec and what it stands for.
        examples: use only the first training examples.

    Raises:
        SpecError: data, loss and program do not fit each other, or the program has more than `LARGEST` variables: the
            message says how many examples would fit.
    """
    loaded, data = prepared.loaded, prepared.data
    x, y = data.train_x[:examples], data.train_y[:examples]
    with placing(loaded), loaded.importing():
        instance = prepared.lifted.bind((x, y), loss=loaded.loss)
        _refuse_large(instance)
        backends: dict[str, Solver] = {"sqp": SQP(), "ipopt": Ipopt()}
        method = loaded.spec.method
        if method.kind not in backends:
            backends[method.kind] = method
        return compare(instance, backends, loaded.spec.run.options(), original=prepared.model)


def _refuse_large(instance: Instance) -> None:
    program = instance.program
    fixed = sum(w.type.count or 0 for w in program.weights if w.trainable)
    each = sum(s.type.count or 0 for s in program.states if s.storage.kind != "eliminated")
    count = fixed + each * instance.examples
    if count > LARGEST:
        room = (LARGEST - fixed) // max(each, 1)
        remedy = f"at most {room} examples fit (--examples {room})" if room > 0 else "it fits with no example at all"
        raise ProgramError(
            f"the exact program has {count:,} variables ({fixed:,} weights, {each:,} states for each of "
            f"{instance.examples:,} examples), more than {LARGEST:,}: {remedy}"
        )
