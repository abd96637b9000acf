"""Augmented-Lagrangian extragradient by multiple shooting, for cells with too many parameters for second order.

In: a `Run` at its first parameters and states. Out: the same run where every start ended. Invariant: a step takes two
batched forward and backward passes of the stages and little else; a start that has ended takes no further work;
what a start does depends on no other start, except through rounding.

States and parameters descend, multipliers ascend, all in both halves of a step (extrapolation, update), which share a
metric of curvature blocks that is measured again every few steps. The weight rho rises from a value at which the
states follow the data, so that the parameters solve a regression, to one at which the states follow the model. A step
after which objective + rho/2 |r|^2 has grown is undone and shortened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lagcompile.backends.shooting_keeping import given, taken
from lagcompile.backends.shooting_lagrangian import Place, Slope, pick, slope
from lagcompile.backends.shooting_metric import Blocks, Diagonal, Diagonals, Metric
from lagcompile.backends.shooting_options import ShootingExtragradient
from lagcompile.backends.shooting_run import RUNNING, SOLVED, STALLED, Run
from lagcompile.dynamics.functional import FORWARD_DIRECTIONS
from lagcompile.ir.keeper import Unkept

_SHORTER, _LONGER, _SHORTEST = 0.3, 1.1, 1e-8
"""Factors of the step length after a step undone and after a sound one; relative length at which a start stalls."""


class Descent:
    """The iteration, for all starts of a run that have not ended.

    Args:
        run: where it starts and where it leaves what it finds.
        method: the options.
        held: True keeps the parameters as they are, to smooth states.
        state: of first-order steps that go on.
    """

    KEPT = (
        "live", "scale", "place", "last", "last_slope", "move_theta", "move_states", "length", "kappa", "steps"
    )  # fmt: skip

    def __init__(
        self, run: Run, method: ShootingExtragradient, *, held: bool = False, state: Mapping[str, Any] | None = None
    ) -> None:
        self.run, self.problem, self.method, self.held = run, run.problem, method, held
        self.live = run.starts[run.code == RUNNING]
        self.scale = run.theta_scale[self.live]
        dual = run.multipliers[self.live]
        self.place = Place(
            run.point.theta[self.live] / self.scale, run.point.states[self.live] / self.problem.state_scale, dual
        )
        self.last, self.last_slope = self.place, Slope.beyond(self.place)
        self.move_theta, self.move_states = torch.zeros_like(self.place.theta), torch.zeros_like(self.place.states)
        self.length = torch.full_like(self.place.theta[:, 0], method.step)
        self.kappa = torch.full_like(self.length, method.rho_start)
        few = self.problem.functions.n + self.problem.functions.p <= FORWARD_DIRECTIONS
        self.blocks = few if method.metric == "auto" else method.metric == "blocks"
        self.generator = torch.Generator(device=dual.device).manual_seed(0)
        self.metric: Metric | None = None
        self.before: Diagonals | None = None
        self.steps = 0
        if state is not None:
            for name in self.KEPT:
                setattr(self, name, given(getattr(self, name), state[name]))
            self.before = None if state["before"] is None else Diagonals(**state["before"])
            self.generator.set_state(state["generator"])
        self.looked = self.steps > 0
        """Whether the next step goes on behind a look: there it was kept."""

    # ---------------------------------------------------------------- the loop
    def solve(self) -> None:
        """Iterate until every start has ended or a limit is reached, and leave the result in the run."""
        if self.steps == 0:
            self._keep_state()
        while len(self.live) and self.steps < self.method.iterations and not self.stopped:
            limit = self.method.time_limit
            if limit is not None and self.run.now() - self.run.clock > limit:
                self.run.timed_out, self.run.keeper = True, Unkept()  # what follows is no way to go on
                break
            if not self._step():
                break
            self.steps += 1
        if len(self.live):
            self._look(last=True)
        if not self.held:
            self.run.steps_before = self.steps

    @property
    def stopped(self) -> bool:
        """Whether a stop was asked for."""
        return not self.held and self.run.keeper.stopped

    def _keep_state(self) -> None:
        """Hand a copy to the keeper: the last look still changes the run."""
        if not self.held:
            own = {**taken(self, self.KEPT), "before": taken(self._estimate()), "generator": self.generator.get_state()}
            state = self.run.state(own)
            self.run.keeper.between(self.steps, lambda: state)

    def _step(self) -> bool:
        """One extrapolation and one update; False where no start is left, or a stop was asked for."""
        if not self.looked:
            metric = self.metric or self._measure()
            rho = self.kappa * metric.unit
            here = self._vetted(slope(self.problem, self.place, self.scale, rho), rho)
            if self.steps and self.steps % self.method.refresh == 0:
                self._look()
                if not len(self.live):
                    return False
                self._keep_state()
                self.looked = True
        if self.looked:
            if self.stopped:
                return False
            self.looked = False
            metric, here = self._measure(), self.last_slope
            rho = self.kappa * metric.unit
        eta = self.method.dual_step * rho[:, None, None, None]
        ahead = self._moved(metric, here)[0]
        ahead = Place(ahead.theta, ahead.states, self.place.dual + eta * here.defect)
        there = slope(self.problem, ahead, self.scale, rho)
        sound = there.finite
        following, move_theta, move_states = self._moved(metric, there)
        stay = Place(self.place.theta, self.place.states, self.place.dual)
        self.move_theta = pick(sound, move_theta, torch.zeros_like(move_theta))
        self.move_states = pick(sound, move_states, torch.zeros_like(move_states))
        self.length = torch.where(sound, self.length, _SHORTER * self.length)
        self.place = Place(following.theta, following.states, self.place.dual + eta * there.defect).where(sound, stay)
        return True

    def _vetted(self, here: Slope, rho: Tensor) -> Slope:
        """Go back where the last step has made things worse; raise rho where it has not."""
        sound = here.finite & (here.merit(rho) <= self.method.increase * self.last_slope.merit(rho))
        self.place, here = self.place.where(sound, self.last), here.where(sound, self.last_slope)
        self.move_theta = pick(sound, self.move_theta, torch.zeros_like(self.move_theta))
        self.move_states = pick(sound, self.move_states, torch.zeros_like(self.move_states))
        undisturbed = sound & (self.length >= self.method.step)
        if not self.held:
            raised = (self.kappa * self.method.rho_growth).clamp_max(self.method.rho_end)
            self.kappa = torch.where(undisturbed, raised, self.kappa)
        longer = (_LONGER * self.length).clamp_max(self.method.step)
        self.length = torch.where(sound, longer, _SHORTER * self.length)
        self.last, self.last_slope = self.place, here
        return here

    def _moved(self, metric: Metric, at: Slope) -> tuple[Place, Tensor, Tensor]:
        """Where a gradient leads from the present place, momentum included, and the moves of parameters and states."""
        by_theta, by_states = metric.steps(at.theta, at.states)
        bounds, scale = self.problem.bounds, self.problem.state_scale
        theta = self.place.theta
        if not self.held:
            theta = theta + self.method.momentum * self.move_theta - self.length[:, None] * by_theta
            theta = theta.clamp(bounds.theta_lower / self.scale, bounds.theta_upper / self.scale)
        states = self.place.states + self.method.momentum * self.move_states
        states = (states - self.length[:, None, None, None] * by_states).clamp(
            bounds.state_lower / scale, bounds.state_upper / scale
        )
        return Place(theta, states, self.place.dual), theta - self.place.theta, states - self.place.states

    # ---------------------------------------------------------------- every few steps
    def _measure(self) -> Metric:
        theta, states = self.place.theta * self.scale, self.place.states * self.problem.state_scale
        if self.blocks:
            self.metric = Blocks(self.problem, theta, states, self.scale)
        else:
            before = self._estimate()
            self.metric = Diagonal(self.problem, theta, states, self.scale, generator=self.generator, before=before)
        self.metric.set_rho(self.kappa * self.metric.unit)
        return self.metric

    def _estimate(self) -> Diagonals | None:
        """Return what the last measurement left for the next one."""
        return self.metric.estimate if isinstance(self.metric, Diagonal) else self.before

    def error(self) -> Tensor:
        """KKT error of the last place, with lambda + rho r as multipliers: what they leave of the gradient is all."""
        bounds, at, place = self.problem.bounds, self.last_slope, self.last
        theta = _free(at.theta, place.theta, bounds.theta_lower / self.scale, bounds.theta_upper / self.scale)
        low, high = bounds.state_lower / self.problem.state_scale, bounds.state_upper / self.problem.state_scale
        states = _free(at.states, place.states, low, high)
        stationarity = torch.maximum(theta.abs().amax(1), states.abs().flatten(1).amax(1))
        return torch.maximum(stationarity / (1.0 + at.objective), at.defect.abs().flatten(1).amax(1))

    def _look(self, *, last: bool = False) -> None:
        """Leave what was reached in the run, let go of the starts that have ended, record numbers."""
        run, error = self.run, self.error()
        run.point.theta[self.live] = self.last.theta * self.scale
        run.iterations[self.live] = self.steps
        ended = torch.full_like(run.code[self.live], RUNNING)
        if not self.held:
            ended[self.length < _SHORTEST * self.method.step] = STALLED
            ended[error <= self.method.tolerance] = SOLVED
        if not self.held:
            run.code[self.live] = ended
        leaving = (ended != RUNNING) | last
        self._store(leaving)
        if not self.held:
            run.record(error, defect=self.last_slope.defect, objective=self.last_slope.objective, step=self.steps)
        if bool(leaving.any()):
            self._keep(~leaving)

    def _store(self, which: Tensor) -> None:
        starts = self.live[which]
        if len(starts) == 0 or self.metric is None:
            return
        place, at = self.last.rows(which), self.last_slope.rows(which)
        rho = (self.kappa * self.metric.unit)[which]
        point = self.problem.evaluate(place.theta * self.scale[which], place.states * self.problem.state_scale)
        self.run.point.store(starts, point)
        if not self.held:
            on = self.problem.stages.defect_on[..., None]
            self.run.multipliers[starts] = (place.dual + rho[:, None, None, None] * at.defect) * on

    def _keep(self, stay: Tensor) -> None:
        self.live, self.scale = self.live[stay], self.scale[stay]
        self.place, self.last = self.place.rows(stay), self.last.rows(stay)
        self.last_slope = self.last_slope.rows(stay)
        self.move_theta, self.move_states = self.move_theta[stay], self.move_states[stay]
        self.length, self.kappa = self.length[stay], self.kappa[stay]
        if isinstance(self.metric, Diagonal):
            self.metric.keep(stay)


def _free(gradient: Tensor, value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The gradient without what only pushes against a bound."""
    held = ((value <= lower) & (gradient > 0)) | ((value >= upper) & (gradient < 0))
    return torch.where(held, torch.zeros_like(gradient), gradient)
