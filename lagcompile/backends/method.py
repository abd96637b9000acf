"""The one interface of methods: frozen options that say what they do and where they are defined.

In: an `Instance`. Out: a `Solution`. Invariant: what a reader may want to know of a method (its formulas, the memory
that it keeps, why it is not defined on a program) the method says itself; no reader asks for its class.

To add a method: its class, in a new file, and its line in workbench/methods.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from lagcompile.backends.base import Executor, RunOptions, Watch, begin, drive, seeded
from lagcompile.backends.best import Evaluate
from lagcompile.ir.base import Frozen, ProgramError
from lagcompile.ir.keeper import Keeper
from lagcompile.ir.program import Program
from lagcompile.ir.solution import Solution
from lagcompile.ir.symbols import Symbols
from lagcompile.runtime.instance import Instance


class Solver(Frozen, ABC):
    """Frozen options of anything that turns an instance into a solution."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    """Options that may change when a run is resumed."""
    stepwise: ClassVar[bool] = False
    """It goes step by step: `executor` makes what a loop drives, and a checkpoint can be taken between two steps."""
    tables: ClassVar[bool] = False
    """It allocates rows for all examples, where the program keeps states."""

    def problems(self, program: Program) -> Iterator[str]:
        """Say why the method is not defined on a program, and what would be: layers, data and loss may add to it."""
        yield from ()

    def accept(self, program: Program) -> None:
        """Check that the method is defined on a program.

        Raises:
            ProgramError: it is not, for all the reasons that the program tells.
        """
        if problems := list(self.problems(program)):
            raise ProgramError(problems)

    def slots(self) -> tuple[int, int]:
        """Return the optimiser's numbers for each number of a kept state, and for each of its multiplier."""
        return 0, 0

    def executor(self, instance: Instance, *, seed: int = 0) -> Executor:
        """Executor of this method on an instance.

        Raises:
            ProgramError: the method has none, or is not defined on this program; the message says what would work.
        """
        raise ProgramError(f"method '{self.name}' solves the whole program at once: it has no steps to drive")

    def tex(self, symbols: Symbols) -> list[str]:
        """Return lines of TeX on what a step does.

        Raises:
            ProgramError: none are known.
        """
        raise ProgramError(f"no LaTeX is known for the method '{self.name}'")

    @property
    def name(self) -> str:
        """Name of the method in a spec."""
        return str(getattr(self, "kind", type(self).__name__))

    @abstractmethod
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
        """Solve an instance.

        Args:
            instance: the bound program.
            options: steps, batch size, seed and so on.
            original: the user's module, for the class of `solution.model`.
            evaluate: numbers of a module on held-out data.
            watch: called with each row of the history.
            start: a solution of the same program to start from, weights, states and multipliers.
            keeper: keeps the run (of step-wise methods it does not: see `backends.keeping.Steps`).

        Raises:
            ProgramError: the method is not defined on this program; the message says what would work.
        """


class Method(Solver):
    """Frozen options of a step-wise method; `executor` binds it to an instance."""

    stepwise = True

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
        """Drive an executor to the end of the options; see `Solver.solve`."""
        begin(instance, start)
        with seeded(instance, options):
            executor = self.executor(instance, seed=options.seed)
            if instance.draws:
                return drive(executor, options, original=original, evaluate=evaluate, watch=watch)
        return drive(executor, options, original=original, evaluate=evaluate, watch=watch)

    @abstractmethod
    def executor(self, instance: Instance, *, seed: int = 0) -> Executor:
        """Executor of this method on an instance.

        Raises:
            ProgramError: the method is not defined on this program; the message says what would work.
        """
