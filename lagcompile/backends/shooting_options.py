"""Options of the multiple-shooting solvers, as a YAML spec names them.

In: keys and values. Out: `Shooting` and `ShootingExtragradient`, frozen records. Invariant: the defaults are the ones
that every figure of the benchmark was measured with; nothing is tuned per problem.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lagcompile.ir.base import Frozen


class StageChoice(Frozen):
    """How long the stages are and where their states start."""

    stage_length: Annotated[int, Field(ge=1)] | Literal["conditioning"] = "conditioning"
    """Samples in a stage. `conditioning`: the longest power of two over which products of step Jacobians along the
    observed trajectory stay under `growth`."""
    growth: float = Field(default=5.0, gt=1)
    """Bound on the norm of Jacobian products over one stage, states in units of their scale."""
    longest_stage: int = Field(default=32, ge=1)
    """Longest stage that `conditioning` may choose."""
    states: Literal["auto", "observations", "smoothing", "simulation"] = "auto"
    """Where states start: the interpolated observations; these after a smoothing pass with the parameters held; a
    simulation. `auto` smooths where a component is not observed."""
    smoothing_passes: int = Field(default=2, ge=1)
    """Steps of the smoothing pass."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds."""
    compiled: bool = False
    """Fuse the cell's functions by torch.compile: seconds once, several times as fast afterwards."""


class Shooting(StageChoice):
    """Gauss-Newton SQP by multiple shooting, batched over trajectories and starts."""

    kind: Literal["shooting"] = "shooting"
    lengthen: int = Field(default=0, ge=0)
    """How often the stage length is doubled once the defects have closed."""
    relax_start: float = Field(default=1e-2, gt=0)
    """First weight of the squared defects, relative to the curvature of the output errors."""
    relax_factor: float = Field(default=10.0, gt=1)
    """Factor by which the weight rises."""
    relax_steps: int = Field(default=2, ge=1)
    """Most accepted steps at one weight."""
    relax_end: float = Field(default=1e3, gt=0, allow_inf_nan=True)
    """Weight at which the defects become equality constraints; infinite: never."""
    newton_after: int | None = Field(default=4, ge=0)
    """Steps with hard defects after which a start that has not converged takes second derivatives into account (up to
    48 states and parameters together); None: never."""
    damping: float = Field(default=1e-4, ge=0)
    """First Levenberg-Marquardt damping, relative to the curvature."""
    backtracks: int = Field(default=6, ge=1)
    """Most step lengths tried, each half of the one before."""
    iterations: int = Field(default=100, ge=1)
    """Most iterations at one stage length."""
    tolerance: float = Field(default=1e-6, gt=0)
    """KKT error at which a start is solved: gradient of the Lagrangian in scaled variables relative to 1 + objective,
    and defects in units of the states."""
    kkt_tolerance: float = Field(default=1e-4, gt=0)
    """Relative accuracy of the linearised defects in each step."""
    barrier_start: float = Field(default=0.1, gt=0)
    """First barrier parameter, where there are bounds."""


class ShootingExtragradient(StageChoice):
    """Augmented-Lagrangian extragradient by multiple shooting, for cells with very many parameters."""

    kind: Literal["shooting_extragradient"] = "shooting_extragradient"
    iterations: int = Field(default=2000, ge=1)
    """Most steps; each takes two gradients."""
    step: float = Field(default=0.3, gt=0)
    """Step of states and parameters in units of the metric; a third is stable where three blocks meet in a defect."""
    momentum: float = Field(default=0.8, ge=0, lt=1)
    """Part of the last move that is made again, in extrapolation and update."""
    dual_step: float = Field(default=0.3, gt=0)
    """Step of the multipliers in units of rho."""
    rho_start: float = Field(default=1e-2, gt=0)
    """First weight of the squared defects, relative to the curvature of the output errors."""
    rho_growth: float = Field(default=1.03, ge=1)
    """Factor by which each undisturbed step raises the weight."""
    rho_end: float = Field(default=10.0, gt=0)
    """Weight at which it stops rising."""
    metric: Literal["auto", "blocks", "diagonal"] = "auto"
    """What preconditions the gradients: `blocks`, the Gauss-Newton curvature of each state and of the parameters;
    `diagonal`, the diagonal of both, estimated by backward passes with random signs, for any number of parameters.
    `auto`: blocks up to 48 states and parameters together."""
    refresh: int = Field(default=10, ge=1)
    """Steps between two measurements of the metric and two looks at the KKT error."""
    increase: float = Field(default=1.1, gt=1)
    """Growth of objective + rho/2 |r|^2 in one step beyond which the step is undone and shortened."""
    tolerance: float = Field(default=1e-4, gt=0)
    """KKT error at which a start is solved, measured as in `Shooting`."""
    polish: Shooting | None = None
    """Gauss-Newton steps from where the first-order method ended; None: none."""


ShootingMethod = Annotated[Shooting | ShootingExtragradient, Field(discriminator="kind")]
"""What a spec may name as its method."""
