"""Shared driver of the exact solvers: the program of an instance, its history, and the solution by name.

In: an `Instance`. Out: a `Solution`. Invariant: a solver gives a `Found` and nothing else; rows of the history,
held-out numbers, seconds and names are made here, so that every exact solver shows and keeps the same things.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lagcompile.backends.base import RunOptions, Watch
from lagcompile.backends.best import Evaluate, evaluated
from lagcompile.backends.keeping import hidden, load_hidden
from lagcompile.backends.method import Solver
from lagcompile.backends.sqp_program import ExactProgram
from lagcompile.backends.sqp_result import row_of, solution_of
from lagcompile.backends.sqp_variables import inexact
from lagcompile.exact import IterationRow, Result
from lagcompile.ir.keeper import Keeper, Unkept
from lagcompile.ir.program import Program
from lagcompile.ir.solution import History, Solution, Status
from lagcompile.runtime.instance import Instance

DEFAULT_SECONDS = 600.0

Written = Callable[[IterationRow], None]


@dataclass(frozen=True)
class Found:
    """What an exact solver found.

    Attributes:
        result: in the form of the general solver's.
        facts: sentences before those of the result.
        remarks: sentences after them.
        details: further details of the solution.
    """

    result: Result
    facts: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class ExactSolver(Solver):
    """Frozen options of a solver of the exact program: all rows of the data in one program, in float64."""

    def problems(self, program: Program) -> Iterator[str]:
        """Say what has no exact form."""
        yield from inexact(program)

    @abstractmethod
    def found(
        self, exact: ExactProgram, start: Solution | None, seconds: float | None, written: Written, keeper: Keeper
    ) -> Found:
        """Solve the exact program.

        Args:
            exact: the program; float64 is the default type meanwhile.
            start: a solution to start from.
            seconds: the run's limit.
            written: takes the iteration table's rows as they are made, for solvers that make them one by one.
            keeper: keeps the run; its state is what the solver itself has handed out.

        Raises:
            ProgramError: the solver is not defined on this program; the message says what would work.
        """

    def solve(
        self,
        instance: Instance,
        options: RunOptions,
        *,
        original: nn.Module,
        evaluate: Evaluate | None = None,
        watch: Watch | None = None,
        start: Solution | None = None,
        keeper: Keeper | None = None,
    ) -> Solution:
        """Solve an instance; see `Solver.solve`.

        Raises:
            ProgramError: the solver is not defined on this program: every reason at once, with stage and module path.
        """
        kept = _Inside(keeper or Unkept(), instance.module)
        rows = list(kept.rows)
        begin = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)

        def written(row: IterationRow) -> None:
            rows.append(row_of(row, time.perf_counter() - begin))
            if watch is not None:
                watch(rows[-1])

        if kept.state is not None:
            original = instance.recover(original)
        exact = ExactProgram(instance, step=options.steps)
        with exact.default_double():
            found = self.found(exact, start, options.time_limit, written, kept)
            table = list(found.result.iterations) or _closing(found.result)
            for row in table[len(rows) :]:
                written(row)
            seconds = time.perf_counter() - begin
            history = History(tuple(rows))
            solution = solution_of(exact, found.result, original=original, history=history, seconds=seconds)
            if evaluate is not None and rows and solution.status is not Status.REFUSED:
                rows[-1] = {**rows[-1], **evaluated(solution.model.eval(), evaluate)}
        facts = (*found.facts, *solution.details["facts"], *found.remarks)
        details = {**solution.details, **found.details, "facts": facts}
        return Solution(**{**vars(solution), "details": details, "history": History(tuple(rows))})


class _Inside:
    """A keeper as the solver sees it: the module, from which the program is made, is kept with the solver's state."""

    def __init__(self, keeper: Keeper, module: nn.Module) -> None:
        self._keeper, self.at_once, self.rows = keeper, keeper.at_once, keeper.rows
        self.state: Mapping[str, Any] | None = None
        if keeper.state is not None:
            self.state = keeper.state["solver"]
            module.load_state_dict(keeper.state["module"])
            load_hidden(module, keeper.state["hidden"])
        self._module = {n: v.clone() for n, v in module.state_dict().items()}
        self._hidden = {n: v.clone() for n, v in hidden(module).items()}

    @property
    def stopped(self) -> bool:
        return self._keeper.stopped

    def between(self, moment: int, state: Callable[[], Mapping[str, Any]]) -> None:
        self._keeper.between(moment, lambda: {"module": self._module, "hidden": self._hidden, "solver": state()})


def _closing(result: Result) -> list[IterationRow]:
    """The point alone, for solvers that show no iterations."""
    if not result.status.solved:
        return []
    kkt = result.kkt
    return [
        IterationRow(
            index=0,
            objective=result.objective,
            primal=kkt.primal,
            dual=max(kkt.stationarity, kkt.dual, kkt.complementarity),
            step=0.0,
            step_norm=0.0,
            regularisation=0.0,
            convexification=0.0,
            mode="start",
            trials=0,
            active=0,
        )
    ]
