"""What a multiple-shooting fit returns.

In: a finished `Run`. Out: `FitResult`: the fitted module, smoothed states, multipliers, defects, residuals, standard
errors.
Invariant: residuals are recomputed from the problem in the user's units, not carried over from the iteration.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lagcompile.backends.shooting_kkt import DefectOperator, KktSystem, Quadratic
from lagcompile.backends.shooting_problem import Point, Problem
from lagcompile.backends.shooting_run import Run
from lagcompile.dynamics.rollout import Rollout
from lagcompile.dynamics.stages import StageJacobians
from lagcompile.dynamics.trajectories import Trajectories
from lagcompile.ir.solution import History, Status

_MOST_STANDARD_ERRORS = 64


@dataclass(frozen=True)
class KktResiduals:
    """Unscaled KKT residuals of one start, in the units of the data.

    Attributes:
        theta: largest derivative of the Lagrangian with respect to a parameter.
        states: largest derivative with respect to a state at a breakpoint.
        defect: largest absolute defect.
        defect_at: words for the place of the largest defect.
    """

    theta: float
    states: float
    defect: float
    defect_at: str


@dataclass(frozen=True)
class ParameterRow:
    """One line of the parameter table."""

    name: str
    value: float
    standard_error: float
    start: float


@dataclass(frozen=True, eq=False)
class FitResult:
    """A fitted model and everything that was found with it. Tensors of one start belong to the best one.

    Attributes:
        rollout: deep copy of the model with the best start's parameters.
        status: how the best start ended; `status.advice` says what to do.
        statuses: how each start ended.
        theta: (starts, p) parameters reached.
        first: (starts, p) guesses.
        objective: (starts,) objectives reached.
        best: index of the best start.
        iterations: (starts,) iterations made.
        stage_length: samples in a stage.
        states: (trajectories, N, n) smoothed states.
        multipliers: (trajectories, stages - 1, n) d objective / d state at the breakpoints.
        defects: (trajectories, stages - 1, n) at the breakpoints.
        breakpoints: samples at which the breakpoints lie.
        residuals: unscaled KKT residuals.
        standard_errors: (p,) from the reduced Hessian, NaN where there are too many parameters or they are not
            identified.
        covariance: (p, p) of the parameters, None where there are too many of them.
        history: numbers of each iteration.
        theta_history: (iterations, starts, p).
        seconds: wall time.
        message: one sentence for a user.
    """

    rollout: Rollout
    status: Status
    statuses: tuple[Status, ...]
    theta: Tensor
    first: Tensor
    objective: Tensor
    best: int
    iterations: Tensor
    stage_length: int
    states: Tensor
    multipliers: Tensor
    defects: Tensor
    breakpoints: Tensor
    residuals: KktResiduals
    standard_errors: Tensor
    covariance: Tensor | None
    history: History
    theta_history: Tensor
    labels: tuple[str, ...]
    seconds: float
    message: str

    def rows(self) -> tuple[ParameterRow, ...]:
        """The parameter table as data."""
        values = zip(
            self.labels,
            self.theta[self.best].tolist(),
            self.standard_errors.tolist(),
            self.first[self.best].tolist(),
            strict=True,
        )
        return tuple(ParameterRow(*v) for v in values)

    def table(self) -> str:
        """The parameter table as text: value, standard error, guess."""
        width = max(len(label) for label in self.labels)
        head = f"{'parameter':<{width}}  {'value':>12}  {'std. error':>11}  {'start':>12}"
        lines = [
            f"{r.name:<{width}}  {r.value:>12.6g}  {r.standard_error:>11.3g}  {r.start:>12.6g}" for r in self.rows()
        ]
        return "\n".join([head, *lines])

    def initial_states(self) -> Tensor:
        """(trajectories, n) smoothed initial states."""
        return self.states[:, 0]

    def simulation_error(self, data: Trajectories, initial: Tensor | None = None, *, skip: int = 0) -> Tensor:
        """Root mean square error (outputs,) of the free-run simulation, single shooting from the initial state.

        Args:
            data: held-out data.
            initial: (trajectories, n) initial states; None: the smoothed ones of this fit, for the data it was
                fitted to.
            skip: samples at the beginning that do not count (a transient from an unknown initial state).
        """
        outputs = self.simulate(data, initial)
        data = data.to(dtype=outputs.dtype)
        counted = data.mask.clone()
        counted[:, :skip] = False
        squared = torch.where(counted, outputs - data.observations, 0.0).square().sum((0, 1))
        return (squared / counted.sum((0, 1)).clamp_min(1)).sqrt()

    def simulate(self, data: Trajectories, initial: Tensor | None = None) -> Tensor:
        """Outputs (trajectories, N, outputs) of the free-run simulation of the fitted module."""
        x0 = self.initial_states() if initial is None else initial
        model = copy.deepcopy(self.rollout).double()
        model.steps = data.samples - 1
        with torch.no_grad():
            moved = data.to(dtype=torch.float64)
            outputs: Tensor = model(x0.to(torch.float64).expand(len(data), -1), moved.inputs, moved.times)
        return outputs

    def __str__(self) -> str:
        solved = sum(s is Status.SOLVED for s in self.statuses)
        return (
            f"{self.status.name.lower()}: {solved} of {len(self.statuses)} starts solved in {self.seconds:.2f} s, "
            f"stages of {self.stage_length}\n{self.table()}"
        )


def collect(rollout: Rollout, run: Run, *, seconds: float) -> FitResult:
    """Result of a finished run."""
    problem = run.problem
    statuses = run.statuses()
    best = _best(run, statuses)
    index = torch.tensor([best], device=run.point.theta.device)
    with torch.no_grad():
        point = run.point.rows(index)
        scale = run.theta_scale[index]
        jacobians, model = problem.linearise(point, scale)
        multipliers = run.multipliers[index]
        residuals = _residuals(problem, point, jacobians, model, multipliers, scale)
        covariance = _covariance(problem, point, jacobians, model, scale)
        fitted = copy.deepcopy(rollout)
        named = dict(fitted.named_parameters())
        for name, value in problem.functions.layout.unflatten(point.theta[0]).items():
            named[name].copy_(value)
    count = problem.stages.count - 1
    errors = torch.full((problem.functions.p,), float("nan"), dtype=point.theta.dtype)
    if covariance is not None:
        errors = covariance.diagonal().clamp_min(0).sqrt()
    cpu = torch.device("cpu")
    return FitResult(
        rollout=fitted,
        status=statuses[best],
        statuses=statuses,
        theta=run.point.theta.to(cpu),
        first=run.first.to(cpu),
        objective=run.point.values.objective.to(cpu),
        best=best,
        iterations=run.iterations.to(cpu),
        stage_length=problem.stages.length,
        states=point.values.path[0].flatten(1, 2)[:, : problem.data.samples].to(cpu),
        multipliers=(multipliers / problem.state_scale)[0, :, :count].to(cpu),
        defects=point.values.defect[0, :, :count].to(cpu),
        breakpoints=(torch.arange(count) + 1) * problem.stages.length,
        residuals=residuals,
        standard_errors=errors.to(cpu),
        covariance=None if covariance is None else covariance.to(cpu),
        history=History(tuple(run.trace.rows)),
        theta_history=torch.stack(run.trace.theta).to(cpu) if run.trace.theta else run.first[None].to(cpu),
        labels=problem.functions.layout.labels(),
        seconds=seconds,
        message=_message(run, statuses, best, residuals),
    )


def _best(run: Run, statuses: tuple[Status, ...]) -> int:
    """The solved start of lowest objective; without one, the start of lowest objective plus violation."""
    score = run.point.values.objective.clone()
    solved = torch.tensor([s is Status.SOLVED for s in statuses], device=score.device)
    violation = run.problem.scaled_defect(run.point.values).abs().flatten(1).sum(1)
    if bool(solved.any()):
        score[~solved] = float("inf")
    else:
        score = score * (1.0 + violation)
    return int(torch.nan_to_num(score, float("inf")).argmin())


def _residuals(
    problem: Problem,
    point: Point,
    jacobians: StageJacobians,
    model: Quadratic,
    multipliers: Tensor,
    scale: Tensor,
) -> KktResiduals:
    back_s, back_t = DefectOperator(jacobians, problem.stages.defect_on).adjoint(multipliers)
    states = (model.state_gradient + back_s) / problem.state_scale
    if problem.fixed_initial:
        states[:, :, 0] = 0.0
    theta = (model.theta_gradient + back_t) / scale
    defect = point.values.defect.abs()
    place = int(defect.argmax())
    size = defect.shape[2] * defect.shape[3]
    trajectory, stage = place // size, (place % size) // defect.shape[3]
    sample = min((stage + 1) * problem.stages.length, problem.data.samples - 1)
    return KktResiduals(
        theta=float(theta.abs().max()),
        states=float(states.abs().max()),
        defect=float(defect.max()),
        defect_at=problem.data.at(trajectory, sample),
    )


def _covariance(
    problem: Problem, point: Point, jacobians: StageJacobians, model: Quadratic, scale: Tensor
) -> Tensor | None:
    """Covariance of the parameters: noise variance times the inverse of the Hessian reduced to the constraints.

    The inverse is the parameter block of the inverse KKT matrix, one solve for each parameter, batched.
    """
    p = problem.functions.p
    if p > _MOST_STANDARD_ERRORS or not bool(point.values.finite.all()):
        return None
    repeat = torch.zeros(p, dtype=torch.int64, device=scale.device)
    wide = Quadratic(
        model.state[repeat],
        model.cross[repeat],
        model.theta[repeat],
        torch.zeros_like(model.state_gradient[repeat]),
        -torch.eye(p, dtype=scale.dtype, device=scale.device),
    )
    system = KktSystem(wide, DefectOperator(jacobians.rows(repeat), problem.stages.defect_on), 1e5 * wide.scale)
    zero = torch.zeros_like(wide.state_gradient)
    step = system.solve(zero, zero, tolerance=1e-6, limit=60)
    if not bool(step.ok.all()):
        return None
    measured = int((problem.stages.weight > 0).sum())
    free = measured - p - len(problem.data) * problem.functions.n * (not problem.fixed_initial)
    variance = 2.0 * float(point.values.residual.square().sum() / 2.0) / max(free, 1)
    return variance * step.theta * scale[0] * scale[0][:, None]


def _message(run: Run, statuses: tuple[Status, ...], best: int, residuals: KktResiduals) -> str:
    status = statuses[best]
    if status is Status.SOLVED:
        return f"solved; largest defect {residuals.defect:.2e}, largest derivative {residuals.theta:.2e}"
    if status is Status.DIVERGED:
        return f"the simulation is not finite in {explosion(run, best)}: start nearer, or shorten the stages"
    advice: Mapping[Status, str] = {
        Status.STALLED: "no step improves objective or defects: scale the data, or try more starts",
        Status.STEPS_DONE: "raise `iterations`, or shorten the stages",
    }
    return f"{advice.get(status, status.advice)}; largest defect {residuals.defect:.2e} at {residuals.defect_at}"


def explosion(run: Run, start: int) -> str:
    """Words for the first place at which the simulation of a start stops being finite."""
    values, problem = run.point.values, run.problem
    bad = ~torch.isfinite(values.path[start]).all(-1) & problem.stages.sample_on
    bad[..., -1] |= ~torch.isfinite(values.defect[start]).all(-1)
    if not bool(bad.any()):
        return "its objective"
    trajectory, sample = (int(v) for v in bad.flatten(1).nonzero()[0])
    return problem.data.at(trajectory, min(sample, problem.data.samples - 1))
