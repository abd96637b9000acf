"""The iteration of the multiple-shooting solver, for all starts at once.

In: a `Problem` and first parameters and states. Out: where every start ended. Invariant: a start that has ended is left
out of all further work; nothing depends on how many other starts there are, except rounding.

Each start passes through two phases. While its defects are soft it minimises objective + rho/2 |r|^2 by Levenberg-
Marquardt steps and raises rho by a constant factor (precision annealing: the states first follow the data, then the
model; see Abarbanel 2013, and "weak-constraint" smoothing). Once rho is large the defects become equality
constraints: Gauss- Newton SQP steps with multipliers, accepted by a filter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lagcompile.backends.shooting_barrier import Barrier, push_inside
from lagcompile.backends.shooting_keeping import Trace, given, taken
from lagcompile.backends.shooting_kkt import DefectOperator, KktSystem, Quadratic, Step
from lagcompile.backends.shooting_options import Shooting
from lagcompile.backends.shooting_problem import Point, Problem
from lagcompile.backends.shooting_search import ROUNDING, Filter
from lagcompile.dynamics.functional import FORWARD_DIRECTIONS
from lagcompile.dynamics.stages import StageJacobians
from lagcompile.dynamics.starts import parameter_scale
from lagcompile.ir.keeper import Keeper, Unkept
from lagcompile.ir.solution import Status

Watch = Callable[[Mapping[str, float]], None]
RUNNING, SOLVED, STALLED, DIVERGED = range(4)
_HARD = 1e5
"""Relative weight of the defects in the preconditioner of hard steps: few inner iterations, small rounding."""


class Run:
    """State of a run over all starts.

    Args:
        problem: what is solved.
        method: the options.
        theta: (starts, p) first parameters.
        states: (starts, trajectories, stages, n) first states.
        clock: value of `now` at which the run began.
        now: seconds.
        watch: called with the numbers of each iteration.
        keeper: keeps the run between two iterations.
    """

    KEPT = (
        "first", "theta_scale", "point", "multipliers", "damping", "kappa", "hard", "newton", "tries", "code",
        "iterations", "filter", "weight", "barriers", "trace", "step_count", "steps_before", "longer",
    )  # fmt: skip
    """What the next iteration depends on."""

    def __init__(
        self,
        problem: Problem,
        method: Shooting,
        theta: Tensor,
        states: Tensor,
        *,
        clock: float,
        now: Callable[[], float] = time.perf_counter,
        watch: Watch | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.problem, self.method, self.clock, self.now, self.watch = problem, method, clock, now, watch
        self.keeper: Keeper = keeper or Unkept()
        bounds = problem.bounds
        self.bounded = bounds.any
        if self.bounded:
            theta = push_inside(theta, bounds.theta_lower, bounds.theta_upper)
            states = push_inside(states, bounds.state_lower, bounds.state_upper)
        self.first = theta.clone()
        self.theta_scale = parameter_scale(problem.functions, theta)
        self.point = problem.evaluate(theta.clone(), states.clone())
        count = theta.shape[0]
        self.starts = torch.arange(count, device=theta.device)
        self.multipliers = torch.zeros_like(states)
        self.damping = theta.new_full((count,), method.damping)
        self.kappa = theta.new_full((count,), method.relax_start)
        self.hard = torch.zeros(count, dtype=torch.bool, device=theta.device)
        self.newton = torch.zeros(count, dtype=torch.int64, device=theta.device)
        self.tries = torch.zeros(count, dtype=torch.int64, device=theta.device)
        self.code = torch.full((count,), RUNNING, dtype=torch.int64, device=theta.device)
        self.code[~self.point.values.finite] = DIVERGED
        self.iterations = torch.zeros_like(self.code)
        self.filter = Filter(count, method.iterations + 1, theta)
        self.weight = theta.new_full((count,), method.barrier_start if self.bounded else 0.0)
        self.barriers = self._barriers(self.point, self.starts) if self.bounded else None
        self.trace = Trace()
        self.step_count = 0
        self.steps_before = 0
        self.longer = 0
        """Times that the stages were made longer."""
        self.timed_out = False

    # ---------------------------------------------------------------- the loop
    def solve(self) -> None:
        """Iterate until every start has ended or the limits are reached."""
        while True:
            self.between()
            active = self.starts[self.code == RUNNING]
            if len(active) == 0 or self.step_count >= self.method.iterations or self.keeper.stopped:
                return
            if self.method.time_limit is not None and self.now() - self.clock > self.method.time_limit:
                self.timed_out, self.keeper = True, Unkept()  # what follows is no way to go on
                return
            self._iterate(active)
            self.step_count += 1

    def between(self) -> None:
        """Hand the state to the keeper."""
        self.keeper.between(self.steps_before + self.step_count, self.state)

    def state(self, descent: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Return all that the run needs to go on.

        Args:
            descent: state of the first-order steps, while they are being made.
        """
        length, seconds = self.problem.stages.length, self.now() - self.clock
        return {"length": length, "seconds": seconds, "run": taken(self, self.KEPT), "descent": descent}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        for name, value in state["run"].items():
            setattr(self, name, given(getattr(self, name), value))

    def smooth(self, passes: int) -> None:
        """Smooth the states with the parameters held: soft steps that estimate what is not observed."""
        for _ in range(passes):
            active = self.starts[self.code == RUNNING]
            jacobians, model = self.problem.linearise(self.point.rows(active), self.theta_scale[active])
            rho = model.scale
            model = model.hold_theta().add_diagonal(self._state_damping(model, rho, self.damping[active]), None)
            jacobians = jacobians.hold_theta()
            step = self._solve(jacobians, model, active, rho, exact=None)
            self._search(active, step, rho, soft_only=True)
        self.damping.fill_(self.method.damping)

    def harden(self) -> None:
        """Continue with defects as equality constraints from where another method ended."""
        self.code[self.point.values.finite] = RUNNING
        self.hard.fill_(True)
        self.damping.fill_(1e-8)

    def lengthened(self) -> Run:
        """A run at twice the stage length that starts where this one ended, with hard defects and its multipliers."""
        problem = self.problem.with_length(2 * self.problem.stages.length)
        states = self.point.states[:, :, ::2].clone()
        shared: dict[str, Any] = {"clock": self.clock, "now": self.now, "watch": self.watch, "keeper": self.keeper}
        run = Run(problem, self.method, self.point.theta, states, **shared)
        kept = self.multipliers[:, :, 1::2]
        run.multipliers[:, :, : kept.shape[2]] = kept
        run.multipliers *= problem.stages.defect_on[..., None]
        run.hard.fill_(True)
        run.damping.fill_(1e-8)
        run.iterations = self.iterations.clone()
        run.trace, run.first, run.steps_before = self.trace, self.first, self.steps_before + self.step_count
        run.longer = self.longer + 1
        return run

    def statuses(self) -> tuple[Status, ...]:
        """Status of every start."""
        late = Status.TIME_LIMIT if self.timed_out else Status.STEPS_DONE
        late = Status.INTERRUPTED if self.keeper.stopped else late
        names = {RUNNING: late, SOLVED: Status.SOLVED, STALLED: Status.STALLED, DIVERGED: Status.DIVERGED}
        return tuple(names[int(c)] for c in self.code.tolist())

    # ---------------------------------------------------------------- one iteration
    def _iterate(self, active: Tensor) -> None:
        jacobians, model = self.problem.linearise(self.point.rows(active), self.theta_scale[active])
        error = self._optimality(active, jacobians, model)
        solved = self.hard[active] & (error <= self.method.tolerance)
        if self.bounded:
            solved &= self.weight[active] <= self.method.tolerance
            self._lower_barrier(active, error)
        if bool(solved.any()):
            self.code[active[solved]] = SOLVED
            active, jacobians, model = active[~solved], jacobians.rows(~solved), model.rows(~solved)
            if len(active) == 0:
                self._record(error)
                return
        hard = self.hard[active]
        rho = torch.where(hard, _HARD, self.kappa[active]) * model.scale
        self._add_curvature(active, model)
        damped = self._damped(active, jacobians, model, rho)
        step = self._solve(jacobians, damped, active, rho, exact=hard)
        self._search(active, step, rho)
        self.iterations[active] += 1
        self._record(error)

    def _add_curvature(self, active: Tensor, model: Quadratic) -> None:
        """Exact second derivatives for starts on which Gauss-Newton steps do not contract."""
        limit, functions = self.method.newton_after, self.problem.functions
        if limit is None or functions.n + functions.p > FORWARD_DIRECTIONS or functions.first_order_only:
            return
        chosen = (self.hard[active] & (self.newton[active] >= limit)).nonzero()[:, 0]
        if len(chosen) == 0:
            return
        starts = active[chosen]
        _, exact = self.problem.linearise(self.point.rows(starts), self.theta_scale[starts], self.multipliers[starts])
        model.store(chosen, exact)

    def _solve(
        self, jacobians: StageJacobians, model: Quadratic, active: Tensor, rho: Tensor, exact: Tensor | None
    ) -> Step:
        defect = self.problem.scaled_defect(self.point.values.rows(active))
        system = KktSystem(model, DefectOperator(jacobians, self.problem.stages.defect_on), rho)
        held = torch.zeros(len(active), dtype=torch.bool, device=rho.device) if exact is None else exact
        return system.solve(defect, self.multipliers[active], exact=held, tolerance=self.method.kkt_tolerance, limit=40)

    def _state_damping(self, model: Quadratic, rho: Tensor, damping: Tensor) -> Tensor:
        """Damping of each state component by its mean curvature, defects included."""
        mean = model.state.diagonal(dim1=-2, dim2=-1).mean((1, 2)) + rho[:, None]
        return (damping[:, None] * mean)[:, None, None, :].expand_as(model.state_gradient)

    def _damped(self, active: Tensor, jacobians: StageJacobians, model: Quadratic, rho: Tensor) -> Quadratic:
        damping = self.damping[active]
        theta = model.theta.diagonal(dim1=-2, dim2=-1) + rho[:, None] * jacobians.end_theta.square().sum((1, 2, 3))
        damped = model.add_diagonal(self._state_damping(model, rho, damping), damping[:, None] * theta + 1e-300)
        if self.barriers is None:
            return damped
        on_theta, on_states = (b.rows(active) for b in self.barriers)
        weight = self.weight[active]
        return damped.add_diagonal(on_states.curvature, on_theta.curvature).add_gradient(
            on_states.gradient(weight[:, None, None, None]), on_theta.gradient(weight[:, None])
        )

    def _optimality(self, active: Tensor, jacobians: StageJacobians, model: Quadratic) -> Tensor:
        """Scaled KKT error: stationarity relative to 1 + objective, and the largest defect in units of the states."""
        op = DefectOperator(jacobians, self.problem.stages.defect_on)
        back_s, back_t = op.adjoint(self.multipliers[active])
        states, theta = model.state_gradient + back_s, model.theta_gradient + back_t
        if self.barriers is not None:
            on_theta, on_states = (b.rows(active) for b in self.barriers)
            theta = theta - on_theta.dual_below + on_theta.dual_above
            states = states - on_states.dual_below + on_states.dual_above
        values = self.point.values.rows(active)
        stationarity = torch.maximum(states.abs().flatten(1).amax(1), theta.abs().amax(1))
        defect = self.problem.scaled_defect(values).abs().flatten(1).amax(1)
        return torch.maximum(stationarity / (1.0 + values.objective), defect)

    # ---------------------------------------------------------------- bounds
    def _barriers(self, point: Point, index: Tensor) -> tuple[Barrier, Barrier]:
        bounds, weight = self.problem.bounds, self.weight[index]
        theta = Barrier.at(
            point.theta, bounds.theta_lower, bounds.theta_upper, self.theta_scale[index], weight[:, None]
        )
        states = Barrier.at(
            point.states, bounds.state_lower, bounds.state_upper, self.problem.state_scale, weight[:, None, None, None]
        )
        return theta, states

    def _barrier_value(self, point: Point, active: Tensor) -> Tensor | float:
        if self.barriers is None:
            return 0.0
        weight = self.weight[active]
        theta, states = self._barriers(point, active)
        return theta.value(weight[:, None]) + states.value(weight[:, None, None, None])

    def _lower_barrier(self, active: Tensor, error: Tensor) -> None:
        """Lower the barrier of starts that are soft, or that have solved the present barrier problem."""
        weight = self.weight[active]
        ready = ~self.hard[active] | (error <= 10.0 * weight)
        lower = torch.minimum(0.2 * weight, weight**1.5).clamp_min(0.1 * self.method.tolerance)
        self.weight[active] = torch.where(ready, lower, weight)
        self.filter.clear(active[ready])

    # ---------------------------------------------------------------- acceptance
    def _search(self, active: Tensor, step: Step, rho: Tensor, *, soft_only: bool = False) -> None:
        """Backtrack along the step of each start, store what is accepted and adapt damping and phase."""
        problem, here = self.problem, self.point.rows(active)
        hard = self.hard[active] & (not soft_only)
        length = torch.ones_like(rho)
        if self.barriers is not None:
            on_theta, on_states = (b.rows(active) for b in self.barriers)
            length = torch.minimum(on_theta.longest(step.theta), on_states.longest(step.states))
        full = length.clone()
        objective = here.values.objective + self._barrier_value(here, active)
        soft_before = objective + 0.5 * rho * problem.scaled_defect(here.values).square().flatten(1).sum(1)
        violation = problem.scaled_defect(here.values).abs().flatten(1).sum(1)
        self.filter.add(active[hard], self.step_count, objective[hard], violation[hard])
        rounding = 1e-14 * here.values.defect[0].numel()
        tiny = torch.full_like(violation, 1e-3 * self.method.tolerance + rounding)
        waiting = step.ok.clone()
        gain = torch.zeros_like(rho)
        for _ in range(self.method.backtracks):
            index = waiting.nonzero()[:, 0]
            if len(index) == 0:
                break
            starts = active[index]
            size = length[index]
            trial = problem.evaluate(
                here.theta[index] + size[:, None] * step.theta[index] * self.theta_scale[starts],
                here.states[index] + size[:, None, None, None] * step.states[index] * problem.state_scale,
            )
            defect = problem.scaled_defect(trial.values)
            cost = trial.values.objective + self._barrier_value(trial, starts)
            soft = cost + 0.5 * rho[index] * defect.square().flatten(1).sum(1)
            passes = self.filter.accepts(starts, cost, defect.abs().flatten(1).sum(1), tiny[index])
            good = torch.where(hard[index], passes, soft <= soft_before[index] * (1.0 + ROUNDING)) & trial.values.finite
            gain[index] = torch.where(good, 1.0 - soft / soft_before[index], gain[index])
            self._accept(starts[good], trial.rows(good), step, index[good], length)
            waiting[index[good]] = False
            length[waiting] *= 0.5
        accepted = step.ok & ~waiting
        self._adapt(active, accepted, length / full, gain, hard, soft_only)

    def _accept(self, starts: Tensor, trial: Point, step: Step, index: Tensor, length: Tensor) -> None:
        if self.barriers is not None:
            bounds, weight = self.problem.bounds, self.weight[starts]
            for barrier, value, change, lower, upper, scale, wide in (
                (
                    self.barriers[0],
                    trial.theta,
                    step.theta[index],
                    bounds.theta_lower,
                    bounds.theta_upper,
                    self.theta_scale[starts],
                    weight[:, None],
                ),
                (
                    self.barriers[1],
                    trial.states,
                    step.states[index],
                    bounds.state_lower,
                    bounds.state_upper,
                    self.problem.state_scale,
                    weight[:, None, None, None],
                ),
            ):
                old = barrier.rows(starts)
                barrier.store(starts, old.duals_after(change, wide, old.moved(value, lower, upper, scale)))
        self.point.store(starts, trial)
        self.multipliers[starts] = step.multipliers[index]

    def _adapt(
        self, active: Tensor, accepted: Tensor, part: Tensor, gain: Tensor, hard: Tensor, soft_only: bool
    ) -> None:
        """Damping up after rejection or a short step, down after a full one; raise rho of soft starts."""
        damping = self.damping[active]
        factor = torch.where(accepted & (part == 1.0), 0.1, torch.where(accepted, 3.0, 100.0))
        floor = torch.where(accepted, 1e-12, 1e-6)
        self.damping[active] = torch.maximum(damping * factor, floor).clamp_max(1e10)
        if soft_only:
            return
        self.code[active[~accepted & (damping >= 1e8)]] = STALLED
        # A rejected step with second derivatives may come from negative curvature: go back to Gauss-Newton for a while.
        self.newton[active] = torch.where(hard & accepted, self.newton[active] + 1, 0)
        tries = self.tries[active] + 1
        raise_it = ~hard & ((accepted & ((gain < 0.5) | (tries >= self.method.relax_steps))) | (tries >= 12))
        self.kappa[active] = torch.where(raise_it, self.kappa[active] * self.method.relax_factor, self.kappa[active])
        self.tries[active] = torch.where(raise_it, 0, tries)
        finished = ~hard & (self.kappa[active] > self.method.relax_end)
        self.hard[active[finished]] = True
        self.damping[active[finished]] = 1e-8

    def record(self, error: Tensor, *, defect: Tensor, objective: Tensor, step: int) -> None:
        """Note the numbers of an iteration.

        Args:
            error: KKT errors of the starts that were running.
            defect: scaled defects (starts, ...).
            objective: (starts,).
            step: number of the iteration.
        """
        finite = objective[torch.isfinite(objective)]
        row = {
            "step": float(step),
            "seconds": self.now() - self.clock,
            "loss": float(finite.min()) if len(finite) else float("inf"),
            "median_loss": float(finite.median()) if len(finite) else float("inf"),
            "defect": float(defect.abs().flatten(1).amax(1).median()),
            "kkt": float(error.median()),
            "running": float((self.code == RUNNING).sum()),
            "solved": float((self.code == SOLVED).sum()),
        }
        self.trace.rows.append(row)
        self.trace.theta.append(self.point.theta.clone())
        if self.watch is not None:
            self.watch(row)

    def _record(self, error: Tensor) -> None:
        values = self.point.values
        self.record(
            error,
            defect=self.problem.scaled_defect(values),
            objective=values.objective,
            step=self.steps_before + self.step_count + 1,
        )
