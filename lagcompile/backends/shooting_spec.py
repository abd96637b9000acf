"""A multiple-shooting fit as a YAML spec.

In: a YAML file that names an example system and its options. Out: `ShootingSpec`, whose `run` gives a `FitResult`.
Invariant: the spec and its seeds determine the result on one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from lagcompile.backends.shooting import fit
from lagcompile.backends.shooting_options import Shooting, ShootingMethod
from lagcompile.backends.shooting_result import FitResult
from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.program import rollout_program
from lagcompile.dynamics.starts import random_starts
from lagcompile.dynamics.systems import Example
from lagcompile.ir.base import NAME, DataError, Frozen
from lagcompile.ir.keeper import Keeper
from lagcompile.ir.program import Program
from lagcompile.ir.yamlfile import validate
from lagcompile.runtime.allocation import WithinMemory


class StartOptions(Frozen):
    """Where the parameters start."""

    count: int = Field(default=100, ge=1)
    """Number of guesses, solved in one run."""
    factor: float = Field(default=5.0, ge=1)
    """Guesses are spread log-uniformly within this factor of the true parameters, in both directions."""
    seed: int = 1


class ShootingSpec(Frozen):
    """A system, noisy data simulated from it, random guesses, and the method that is to find the parameters."""

    FILE = ("shooting spec", "kind", "system")
    kind: Literal["shooting"] = "shooting"
    name: str = Field(pattern=NAME)
    """Name of the fit, and of its folder."""
    about: str = ""
    system: Example
    data_seed: int = 0
    starts: StartOptions = StartOptions()
    bounds: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)
    """Parameter -> lower and upper bound; null for none."""
    method: ShootingMethod = Shooting()

    @field_validator("method", mode="before")
    @classmethod
    def _default_kind(cls, value: object) -> object:
        """A method without a kind is the default one."""
        return {"kind": "shooting", **value} if isinstance(value, dict) else value

    def program(self, length: int) -> Program:
        """The program at a stage length."""
        return rollout_program(self.system.rollout(), self.system.data(self.data_seed), length, name=self.name)

    def run(
        self, watch: Callable[[Mapping[str, float]], None] | None = None, keeper: Keeper | None = None
    ) -> FitResult:
        """Simulate the data, draw the guesses and fit."""
        with WithinMemory(DataError, "take fewer samples or guesses"):
            rollout = self.system.rollout()
            truth = CellFunctions(rollout).start()
            starts = random_starts(truth, self.starts.count, factor=self.starts.factor, seed=self.starts.seed)
            data = self.system.data(self.data_seed)
        noise = self.system.noise
        return fit(
            rollout,
            data,
            method=self.method,
            starts=starts,
            noise=noise,
            bounds=self.bounds or None,
            watch=watch,
            keeper=keeper,
        )

    def recovered(self, result: FitResult, tolerance: float = 0.02) -> float:
        """Share of starts that reach every true parameter within a relative tolerance."""
        truth = CellFunctions(self.system.rollout()).start()
        worst = ((result.theta - truth) / truth).abs().amax(1)
        return float((worst < tolerance).double().mean())


def load(path: str | Path) -> ShootingSpec:
    """Read a spec.

    Raises:
        SpecError: the file is wrong; each problem names a line.
    """
    return validate(path, ShootingSpec)
