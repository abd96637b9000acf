"""Fit a rollout to measured trajectories by multiple shooting: the front door of the method.

In: a `Rollout`, `Trajectories`, options and what is known (noise, priors, bounds, guesses). Out: a `FitResult`.
Invariant: the user's module is only read; all starts are solved together and the best one is handed back as a new
module.

    result = fit(rollout, data, method=Shooting(), starts=100)
    result.rollout, result.status, result.table()
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lagcompile.backends.shooting_gradient import Descent
from lagcompile.backends.shooting_options import Shooting, ShootingExtragradient
from lagcompile.backends.shooting_problem import Bounds, Gaussian, Problem
from lagcompile.backends.shooting_result import FitResult, collect
from lagcompile.backends.shooting_run import Run, Watch
from lagcompile.dynamics.functional import FORWARD_DIRECTIONS, CellFunctions
from lagcompile.dynamics.rollout import Rollout
from lagcompile.dynamics.stages import Stages
from lagcompile.dynamics.starts import (
    conditioned_length,
    growth,
    observation_map,
    random_starts,
    state_scale,
    states_from_observations,
    states_from_simulation,
    windows,
)
from lagcompile.dynamics.trajectories import Trajectories
from lagcompile.ir.base import BindError, DataError
from lagcompile.ir.keeper import Keeper, Unkept

__all__ = ["FitResult", "Gaussian", "Shooting", "ShootingExtragradient", "fit"]

Limits = tuple[float | None, float | None]
_PROBES = 8
_SMOOTHING_STEPS = 20
"""First-order steps that replace one smoothing pass."""


def fit(
    rollout: Rollout,
    data: Trajectories,
    *,
    method: Shooting | ShootingExtragradient | None = None,
    starts: Tensor | int = 1,
    spread: float = 5.0,
    noise: float | Sequence[float] | None = None,
    observed: Sequence[int] | None = None,
    bounds: Mapping[str, Limits] | None = None,
    state_bounds: Mapping[int, Limits] | None = None,
    prior: Gaussian | None = None,
    initial: Gaussian | Tensor | None = None,
    seed: int = 0,
    device: str = "cpu",
    functions: CellFunctions | None = None,
    watch: Watch | None = None,
    now: Callable[[], float] | None = None,
    keeper: Keeper | None = None,
) -> FitResult:
    """Estimate parameters and states by multiple shooting.

    Args:
        rollout: the model; parameters with requires_grad are estimated, from where they are.
        data: the measurements; its longest trajectory may be of any length, `rollout.steps` is not used.
        method: options of the solver: `Shooting` (second order, the default) or `ShootingExtragradient` (first order).
        starts: parameter guesses (starts, p), or how many: the first is the module's own, the others are drawn
            log-uniformly within `spread` of it.
        spread: factor for drawn guesses.
        noise: standard deviation of each output's noise, the unit of its errors; None: the output's own deviation.
        observed: state component that each output measures, -1 for none; needed with a readout module.
        bounds: parameter name -> (lower, upper), None for no bound.
        state_bounds: state component -> (lower, upper).
        prior: Gaussian knowledge of the parameters (p,).
        initial: Gaussian knowledge of the initial states (trajectories, n), or a tensor of known initial states.
        seed: seed of drawn guesses.
        device: where to compute; float64 throughout.
        functions: the rollout's functions, to use compiled ones (`CellFunctions(rollout, compile=True)`) in many fits;
            None makes them.
        watch: called with the numbers of each iteration.
        now: the clock of time limits and `seconds`; None: `time.perf_counter`.
        keeper: keeps the fit between two iterations, and has the state to go on from; arguments must then be the same.

    Raises:
        BindError: model and data do not fit together.
        DataError: the data have no variation and no noise level was given.
    """
    kept, now = keeper or Unkept(), now or time.perf_counter
    state = kept.state
    clock = now() - (0.0 if state is None else state["seconds"])
    method = method or Shooting()
    functions = functions or CellFunctions(rollout, torch.float64, device, compile=method.compiled)
    if functions.rollout is not rollout:
        raise BindError("functions belong to another rollout: make them by CellFunctions(rollout, compile=True)")
    data = data.to(dtype=functions.dtype, device=functions.device)
    theta = _guesses(functions, starts, spread, seed)
    with torch.no_grad():
        problem, path = _problem(functions, data, observed, noise, prior, initial)
        problem = replace(problem, bounds=Bounds.of(functions, bounds or {}, state_bounds or {}))
        complete = set(range(functions.n)) <= set(observation_map(rollout, data, observed))
        if method.states == "simulation" and state is None:
            path = states_from_simulation(functions, data, theta, path[0, :, 0])
        smooth = method.states == "smoothing" or (method.states == "auto" and not complete)
        length = _stage_length(problem, method, theta, path, smooth=smooth) if state is None else state["length"]
        problem = problem.with_length(length)
        states = path[:, :, :: problem.stages.length].expand(theta.shape[0], -1, -1, -1)
        solver = method if isinstance(method, Shooting) else method.polish or Shooting()
        run = Run(problem, solver, theta, states, clock=clock, now=now, watch=watch, keeper=kept)
        if state is not None:
            run.load(state)
        elif smooth:
            _smooth(run, method)
        run = _descended(run, method, state) if isinstance(method, ShootingExtragradient) else _solved(run)
    return collect(rollout, run, seconds=now() - clock)


def _solved(run: Run) -> Run:
    """Gauss-Newton steps, at longer and longer stages."""
    run.solve()
    while run.longer < run.method.lengthen and run.problem.stages.count > 1 and not run.keeper.stopped:
        run = run.lengthened()
        run.solve()
    return run


def _descended(run: Run, method: ShootingExtragradient, state: Mapping[str, Any] | None) -> Run:
    """First-order steps, and Gauss-Newton steps after them where they are asked for."""
    behind = state is not None and state["descent"] is None
    if not behind:
        Descent(run, method, state=None if state is None else state["descent"]).solve()
    if run.keeper.stopped:
        return run
    if method.polish is None:
        run.between()
        return run
    if not behind:
        run.harden()
    run.solve()
    return run


def _smooth(run: Run, method: Shooting | ShootingExtragradient) -> None:
    """Smooth the states, by first-order steps where the parameters are too many for Jacobians."""
    functions = run.problem.functions
    if isinstance(method, Shooting) or functions.n + functions.p <= FORWARD_DIRECTIONS:
        run.smooth(method.smoothing_passes)
        return
    steps = _SMOOTHING_STEPS * method.smoothing_passes
    Descent(
        run, method.model_copy(update={"iterations": steps, "rho_start": 1.0, "time_limit": None}), held=True
    ).solve()


def _guesses(functions: CellFunctions, starts: Tensor | int, spread: float, seed: int) -> Tensor:
    centre = functions.start()
    if isinstance(starts, int):
        if starts < 1:
            raise BindError(f"starts={starts}: at least one guess is needed")
        drawn = random_starts(centre.cpu(), starts - 1, factor=spread, seed=seed).to(centre)
        return torch.cat([centre[None], drawn])
    guesses = starts.to(centre)
    if guesses.dim() != 2 or guesses.shape[1] != functions.p:
        raise BindError(
            f"starts have shape {tuple(starts.shape)}; the rollout has {functions.p} parameters "
            f"({', '.join(functions.layout.labels()[:6])}): pass (starts, {functions.p})"
        )
    bad = (~guesses.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise BindError(f"starts: guess {bad[0]} holds numbers that are not finite: no fit can start there")
    return guesses


def _problem(
    functions: CellFunctions,
    data: Trajectories,
    observed: Sequence[int] | None,
    noise: float | Sequence[float] | None,
    prior: Gaussian | None,
    initial: Gaussian | Tensor | None,
) -> tuple[Problem, Tensor]:
    """The problem with stages of one sample, and the states that the observations suggest."""
    components = observation_map(functions.rollout, data, observed)
    path = states_from_observations(data, components, functions.n)[None]
    weights = 1.0 / _noise(data, noise)
    fixed = isinstance(initial, Tensor)
    if isinstance(initial, Tensor):
        known = initial.to(path).expand(len(data), functions.n)
        path[0, :, 0] = known
        initial = None
    none = Bounds.of(functions, {}, {})
    problem = Problem(
        functions,
        data,
        Stages(functions, data, 1, weights),
        weights,
        state_scale(path, data),
        none,
        theta_prior=prior,
        initial_prior=initial,
        fixed_initial=fixed,
    )
    return problem, path


def _noise(data: Trajectories, noise: float | Sequence[float] | None) -> Tensor:
    if noise is not None:
        level = torch.as_tensor(noise, dtype=data.observations.dtype, device=data.observations.device)
        if not bool((level > 0).all()) or level.dim() > 1 or (level.dim() == 1 and len(level) != data.outputs):
            raise BindError(
                f"noise must be positive, one number or one for each of {data.outputs} outputs: got {noise}"
            )
        return level.expand(data.outputs)
    levels = []
    for c in range(data.outputs):
        values = data.observations[..., c][data.mask[..., c]]
        deviation = float(values.std()) if len(values) > 1 else 0.0
        if not deviation > 0:
            raise DataError(f"output {c} does not vary (or is never measured): drop it, or pass noise=its deviation")
        levels.append(deviation)
    return torch.tensor(levels, dtype=data.observations.dtype, device=data.observations.device)


def _stage_length(
    problem: Problem, method: Shooting | ShootingExtragradient, theta: Tensor, path: Tensor, *, smooth: bool
) -> int:
    """The stage length asked for, or the longest one over which Jacobian products stay bounded.

    A wrong guess may look harmless (a decaying cell) where the data are chaotic, so a few soft steps on short windows
    of the data come first, and growth is measured with the parameters that they reach.
    """
    if isinstance(method.stage_length, int):
        return method.stage_length
    functions = problem.functions
    pieces = windows(problem.data)
    probe = replace(
        problem,
        data=pieces,
        stages=Stages(functions, pieces, 1, problem.weights),
        initial_prior=None,
        fixed_initial=False,
    )
    states = _window_states(problem, pieces, path)
    few = theta[:_PROBES]
    states = states.expand(len(few), -1, -1, -1)
    soft = Shooting(iterations=3, relax_factor=2.0, relax_end=math.inf)
    second_order = isinstance(method, Shooting) or functions.n + functions.p <= FORWARD_DIRECTIONS
    if isinstance(method, Shooting):
        kept = {"iterations": 3, "relax_factor": 2.0, "relax_end": math.inf, "time_limit": None}
        soft = method.model_copy(update=kept)
    run = Run(probe, soft, few, states, clock=0.0)
    if smooth:
        _smooth(run, method)
    if second_order:
        run.solve()
    elif isinstance(method, ShootingExtragradient):
        Descent(
            run, method.model_copy(update={"iterations": _SMOOTHING_STEPS, "rho_growth": 1.0, "time_limit": None})
        ).solve()
    norms = growth(functions, problem.data, run.point.theta, path[:1], longest=method.longest_stage)
    return conditioned_length(norms, method.growth)


def _window_states(problem: Problem, pieces: Trajectories, path: Tensor) -> Tensor:
    """States of the windows cut out of states along the whole data, found by their time stamps."""
    if pieces is problem.data:
        return path[:1]
    rows = []
    for name, times in zip(pieces.names, pieces.times, strict=True):
        owner = problem.data.names.index(name.rsplit("[", 1)[0])
        first = int(torch.searchsorted(problem.data.times[owner], times[0]))
        piece = path[0, owner, first : first + pieces.samples]
        missing = pieces.samples - piece.shape[0]
        rows.append(torch.cat([piece, piece[-1:].expand(missing, -1)]))
    return torch.stack(rows)[None]
