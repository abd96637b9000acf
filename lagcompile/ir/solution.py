"""What a backend returns: a status with advice, the history of the run, and the values that were reached.

In: numbers and tensors from a backend. Out: `Solution`. Invariant: non-convergence is a `Status`, never an exception;
the history holds plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from lagcompile.ir.program import Program


class Status(Enum):
    """Why a run ended; the value is a sentence of advice."""

    SOLVED = "the KKT conditions hold to the tolerance asked for"
    STEPS_DONE = "all steps were made; look at the final defect and the curves to see whether more would help"
    TIME_LIMIT = "the time limit was reached; raise it, or resume from the checkpoint"
    INTERRUPTED = "stopped by the user; the solution holds what was reached, and the run can be resumed"
    WORSE = (
        "on a fixed sample of the training examples the network does worse than at the start; the last iterate is "
        "returned, the best weights are in details['best_weights']. Lower the step sizes, the weights' first, or make "
        "more steps if the loss still falls"
    )
    DIVERGED = (
        "loss, weights, states or multipliers left the finite range; the best iterate before that is returned. Lower "
        "the multipliers' step first, then the states'; a quadratic weight rho > 0 damps the oscillation"
    )
    INFEASIBLE = "the constraints contradict each other; see the violated ones by name"
    UNBOUNDED = "the objective falls without bound; bound the variables or add a regulariser"
    STALLED = "no further progress is possible in this precision; look at the residuals before trusting the point"
    REFUSED = "the program does not fit this backend; the message says what would"

    @property
    def advice(self) -> str:
        """What to do."""
        return self.value


@dataclass(frozen=True)
class History:
    """Numbers along a run, one row for each look.

    Attributes:
        rows: mappings such as {"step": 50, "seconds": 1.2, "loss": 0.3, "accuracy": 0.9, "defect": 1e-3, ...}.
    """

    rows: tuple[Mapping[str, Any], ...] = ()

    def column(self, name: str) -> list[float]:
        """Return one quantity over the rows that have it."""
        return [float(r[name]) for r in self.rows if name in r]

    def pairs(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of one quantity, where both are known."""
        found = [(float(r["step"]), float(r[name])) for r in self.rows if name in r]
        return [s for s, _ in found], [v for _, v in found]

    @property
    def last(self) -> Mapping[str, Any]:
        """The last row; empty where there is none."""
        return self.rows[-1] if self.rows else {}


class Checked(Protocol):
    """What a certificate says (`check.certificate.Certificate`)."""

    @property
    def verdict(self) -> Literal["ok", "failed", "not assessed"]:
        """Whether it holds, fails, or was not assessed."""

    @property
    def ok(self) -> bool:
        """Whether it holds."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it was not assessed."""

    def file_bytes(self) -> bytes:
        """The certificate as a file, JSON."""


@dataclass(frozen=True)
class Solution:
    """Result of a run.

    Attributes:
        model: a new module of the user's class with the solved weights, under the user's state_dict keys.
        status: why the run ended; `status.advice` says what to do.
        history: numbers along the run.
        states: state name -> values, one row for each example (or class, with mean and deviation).
        multipliers: multiplier name -> values, laid out as the program says.
        program: the program that was solved.
        steps: number of steps.
        gradient_evaluations: number of forward and backward passes.
        seconds: wall time of the steps.
        details: further results of the backend (iteration tables, best iterate and so on).
        certificate: whether the solved network is the model, on a few rows; None where it was not checked.
    """

    model: Any
    status: Status
    history: History
    states: Mapping[str, torch.Tensor]
    multipliers: Mapping[str, torch.Tensor]
    program: Program
    steps: int
    gradient_evaluations: int
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)
    certificate: Checked | None = None

    def __repr__(self) -> str:
        return f"Solution({self})"

    def __str__(self) -> str:
        shown = ((k, v) for k, v in self.history.last.items() if k not in {"step", "seconds"})
        last = ", ".join(f"{k} {v:.4g}" if isinstance(v, int | float) else f"{k} {v}" for k, v in shown)
        said = "" if self.certificate is None else f"; certificate {self.certificate.verdict}"
        return f"{self.status.name.lower()} after {self.steps} steps in {self.seconds:.1f} s: {last}{said}"
