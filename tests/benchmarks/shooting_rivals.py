"""The other ways to fit the benchmark problems: backprop through the rollout, segments from data, CasADi with IPOPT.

In: an `Example`, guesses, a time budget. Out: `Outcome`, parameters and counts for every guess. Invariant: every method
sees the same data, the same guesses and the same budget for all guesses together; none sees the true parameters.
Seconds are those of the CPU in this process, on one thread, so that other work on the machine counts little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lagcompile.backends.shooting import Shooting, ShootingExtragradient, fit
from lagcompile.backends.shooting_lagrangian import Place, slope
from lagcompile.backends.shooting_problem import Bounds, Problem
from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.stages import Stages
from lagcompile.dynamics.starts import observation_map, parameter_scale, state_scale, states_from_observations
from lagcompile.dynamics.systems import Example


@dataclass(frozen=True)
class Outcome:
    """Parameters (runs, p), iterations of each run, and seconds of each of them.

    Attributes:
        theta: parameters reached; fewer rows than guesses where the budget did not allow more runs.
        iterations: per run.
        seconds: per run: its own time, or the whole time divided by the guesses where they run together.
        note: what a reader should know.
    """

    theta: Tensor
    iterations: list[float]
    seconds: list[float]
    note: str = ""


Method = Callable[[Example, int, Tensor, float], Outcome]


def _together(theta: Tensor, iterations: Tensor | float, spent: float, note: str) -> Outcome:
    count = len(theta)
    each = iterations.double().tolist() if isinstance(iterations, Tensor) else [iterations] * count
    return Outcome(theta, each, [spent / count] * count, note)


def _fit(
    example: Example, seed: int, guesses: Tensor, budget: float, method: Shooting | ShootingExtragradient
) -> Outcome:
    """This project's `fit`, all guesses in one run; compiling is counted apart, as CasADi's building is."""
    functions, note = CellFunctions(example.rollout(), compile=method.compiled), ""
    if method.compiled:
        begin = time.process_time()
        few = {"iterations": 12} if isinstance(method, ShootingExtragradient) else {}
        fit(
            functions.rollout,
            example.data(seed),
            starts=guesses,
            noise=example.noise,
            method=method.model_copy(update=few),
            functions=functions,
        )
        note = f"; compiling took {time.process_time() - begin:.0f} s more"
    begin = time.process_time()
    result = fit(
        functions.rollout,
        example.data(seed),
        starts=guesses,
        noise=example.noise,
        method=method.model_copy(update={"time_limit": budget}),
        functions=functions,
        now=time.process_time,
    )
    spent = time.process_time() - begin
    words = f"stages of {result.stage_length}, all guesses in {spent:.2f} s{note}"
    return _together(result.theta, result.iterations, spent, words)


def sqp(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """Gauss-Newton SQP with default options."""
    return _fit(example, seed, guesses, budget, Shooting())


def sqp_compiled(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """Gauss-Newton SQP with compiled kernels."""
    return _fit(example, seed, guesses, budget, Shooting(compiled=True))


def first_order(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """Augmented-Lagrangian extragradient."""
    return _fit(example, seed, guesses, budget, ShootingExtragradient(compiled=True))


def first_order_diagonal(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """The same in the diagonal metric, which needs no Jacobian."""
    return _fit(example, seed, guesses, budget, ShootingExtragradient(compiled=True, metric="diagonal"))


def polished(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """200 steps of extragradient, then Gauss-Newton."""
    return _fit(example, seed, guesses, budget, ShootingExtragradient(compiled=True, iterations=200, polish=Shooting()))


@dataclass(frozen=True)
class Rollouts:
    """The problem at one stage length with the same compiled kernels as above.

    Attributes:
        problem: the problem; stages as long as the data are the whole rollout.
        path: (1, trajectories, N, n) states as the observations suggest them.
        scale: (guesses, p) units of the parameters.
        building: seconds of compiling.
    """

    problem: Problem
    path: Tensor
    scale: Tensor
    building: float

    @classmethod
    def of(
        cls, example: Example, seed: int, guesses: Tensor, length: int, *, functions: CellFunctions | None = None
    ) -> Rollouts:
        """Set the problem up and compile."""
        begin = time.process_time()
        functions = functions or CellFunctions(example.rollout(), compile=True)
        data = example.data(seed)
        weights = torch.full((data.outputs,), 1.0 / example.noise, dtype=torch.float64)
        path = states_from_observations(data, observation_map(functions.rollout, data), functions.n)[None]
        stages = Stages(functions, data, length, weights)
        bounds = Bounds.of(functions, {}, {})
        problem = Problem(functions, data, stages, weights, state_scale(path, data), bounds)
        made = cls(problem, path, parameter_scale(functions, guesses), 0.0)
        made.value(guesses / made.scale, made.first(len(guesses)), 0.0)
        return cls(problem, path, made.scale, time.process_time() - begin)

    def first(self, count: int) -> Tensor:
        """Scaled first states of the stages as the data suggest them."""
        states = self.path[:, :, :: self.problem.stages.length].expand(count, -1, -1, -1)
        return states / self.problem.state_scale

    def value(self, theta: Tensor, states: Tensor, jump: float) -> tuple[Tensor, Tensor, Tensor]:
        """Objective with jumps penalised (guesses,), and its gradients by scaled parameters and states."""
        rho = torch.full_like(theta[:, 0], 2.0 * jump)
        with torch.no_grad():
            found = slope(self.problem, Place(theta, states, torch.zeros_like(states)), self.scale, rho)
        return found.merit(rho), found.theta, found.states


def _adam(rollouts: Rollouts, guesses: Tensor, budget: float, *, jump: float, free: bool) -> tuple[Tensor, int]:
    """Adam on scaled parameters and, where free, states; all guesses together; keeps each one's best value."""
    z, s = guesses / rollouts.scale, rollouts.first(len(guesses)).clone()
    optimizer = torch.optim.Adam([z.requires_grad_(True), s.requires_grad_(True)], lr=0.02)
    best, kept = torch.full((len(guesses),), float("inf"), dtype=torch.float64), guesses.clone()
    begin, steps = time.process_time(), 0
    while time.process_time() - begin < budget and steps < 4000:
        value, *gradients = rollouts.value(z.detach(), s.detach(), jump)
        better = value < best
        best = torch.where(better, value, best)
        kept[better] = (z.detach() * rollouts.scale)[better]
        if not free:
            gradients[1] = torch.zeros_like(s)
        for variable, gradient in zip((z, s), gradients, strict=True):
            norm = gradient.flatten(1).norm(dim=1).clamp_min(1.0).view(-1, *[1] * (gradient.dim() - 1))
            variable.grad = torch.nan_to_num(gradient / norm, 0.0, 0.0, 0.0)
        optimizer.step()
        steps += 1
    return kept, steps


def adam(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """Backprop through the whole rollout, Adam with clipped gradients, initial state free."""
    rollouts = Rollouts.of(example, seed, guesses, example.samples)
    begin = time.process_time()
    theta, steps = _adam(rollouts, guesses, budget, jump=0.0, free=True)
    note = f"compiling took {rollouts.building:.0f} s more"
    return _together(theta, float(steps), time.process_time() - begin, note)


def segments(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """Segments of 5 samples restarted from the data, jumps penalised by a fixed weight of 100, Adam; no free states."""
    rollouts = Rollouts.of(example, seed, guesses, 5)
    begin = time.process_time()
    theta, steps = _adam(rollouts, guesses, budget, jump=100.0, free=False)
    note = f"compiling took {rollouts.building:.0f} s more"
    return _together(theta, float(steps), time.process_time() - begin, note)


def lbfgs(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """Backprop through the whole rollout, L-BFGS (memory 10, backtracking), all guesses together, each its own step."""
    rollouts = Rollouts.of(example, seed, guesses, example.samples)
    shape = rollouts.first(len(guesses)).shape

    def value(v: Tensor) -> tuple[Tensor, Tensor]:
        p = guesses.shape[1]
        f, by_theta, by_state = rollouts.value(v[:, :p], v[:, p:].view(shape), 0.0)
        gradient = torch.cat([by_theta, by_state.flatten(1)], 1)
        bad = ~torch.isfinite(f) | ~torch.isfinite(gradient).all(1)
        return f.masked_fill(bad, float("inf")), gradient.masked_fill(bad[:, None], 0.0)

    begin, evaluations = time.process_time(), 1
    v = torch.cat([guesses / rollouts.scale, rollouts.first(len(guesses)).flatten(1)], 1)
    f, g = value(v)
    pairs: list[tuple[Tensor, Tensor]] = []
    length = torch.ones_like(f)
    direction = _two_loops(g, pairs)
    while time.process_time() - begin < budget and evaluations < 4000:
        trial = v + length[:, None] * direction
        new, slope_there = value(trial)
        evaluations += 1
        good = new <= f + 1e-4 * length * (g * direction).sum(1)
        good &= torch.isfinite(new)
        step = torch.where(good[:, None], trial - v, 0.0)
        pairs = [*pairs[-9:], (step, torch.where(good[:, None], slope_there - g, 0.0))]
        v, f = v + step, torch.where(good, new, f)
        g = torch.where(good[:, None], slope_there, g)
        direction = torch.where(good[:, None], _two_loops(g, pairs), direction)
        length = torch.where(good, 1.0, 0.5 * length)
    theta = v[:, : guesses.shape[1]] * rollouts.scale
    note = f"iterations are evaluations; compiling took {rollouts.building:.0f} s more"
    return _together(theta, float(evaluations), time.process_time() - begin, note)


def _two_loops(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """L-BFGS direction of each guess; pairs of negative curvature, and those of steps not made, are left out."""
    q, kept = gradient.clone(), []
    scale = 1.0 / gradient.norm(dim=1).clamp_min(1e-300)
    scale = scale.clamp_max(1.0)
    for step, change in pairs:
        product = (step * change).sum(1)
        sound = product > 1e-12 * change.square().sum(1).clamp_min(1e-300)
        kept.append((step, change, torch.where(sound, 1.0 / product, 0.0)))
        scale = torch.where(sound, product / change.square().sum(1).clamp_min(1e-300), scale)
    weights = []
    for step, change, inverse in reversed(kept):
        weights.append(inverse * (step * q).sum(1))
        q = q - weights[-1][:, None] * change
    q = scale[:, None] * q
    for (step, change, inverse), weight in zip(kept, reversed(weights), strict=True):
        q = q + (weight - inverse * (change * q).sum(1))[:, None] * step
    return -q


def _field(ca: Any, name: str, x: Any, t: Any, u: Any) -> Any:
    fields: dict[str, Callable[[], Any]] = {
        "lorenz": lambda: ca.vertcat(t[0] * (x[1] - x[0]), x[0] * (t[1] - x[2]) - x[1], x[0] * x[1] - t[2] * x[2]),
        "van_der_pol": lambda: ca.vertcat(x[1], t[0] * (1 - x[0] ** 2) * x[1] - t[1] * x[0]),
        "pendulum": lambda: ca.vertcat(x[1], -t[0] * ca.sin(x[0]) - t[1] * x[1] + t[2] * u),
        "fitzhugh_nagumo": lambda: ca.vertcat(x[0] - x[0] ** 3 / 3 - x[1] + 0.5, t[2] * (x[0] + t[0] - t[1] * x[1])),
    }
    return fields[name]()


EXPANDED = 2000
"""Samples up to which CasADi's graph is written out, which evaluates fastest."""


class Ipopt:
    """Multiple shooting in CasADi (exact Hessian) solved by IPOPT.

    Args:
        example: the problem.
        seed: of the data.
        length: samples in a stage.
    """

    def __init__(self, example: Example, seed: int, length: int) -> None:
        import casadi as ca

        begin = time.process_time()
        data = example.data(seed)
        self.y = data.observations[0].numpy()
        n, p, dt, count = len(example.initial), CellFunctions(example.rollout()).p, example.dt, example.samples
        x, t, u = ca.SX.sym("x", n), ca.SX.sym("t", p), ca.SX.sym("u")
        if example.name == "logistic":
            following = t[0] * x * (1 - x)
        else:

            def slope(at: Any) -> Any:
                return _field(ca, example.name, at, t, u)

            k1 = slope(x)
            k2 = slope(x + dt / 2 * k1)
            k3 = slope(x + dt / 2 * k2)
            following = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + dt * k3))
        step = ca.Function("step", [x, t, u], [following])
        stages = -(-count // length)
        if count > EXPANDED and data.inputs is None:
            problem = self._mapped(ca, step, example, (n, p, length, count))
        else:
            states, theta = ca.SX.sym("states", n, stages), ca.SX.sym("theta", p)
            cost, defects = 0, []
            for k in range(stages):
                z = states[:, k]
                for sample in range(k * length, min((k + 1) * length, count)):
                    cost += ca.sumsqr((z[list(example.observed)] - self.y[sample]) / example.noise) / 2
                    if sample < count - 1:
                        z = step(z, theta, 0.0 if data.inputs is None else float(data.inputs[0, sample, 0]))
                if k < stages - 1:
                    defects.append(z - states[:, k + 1])
            problem = {"x": ca.vertcat(theta, ca.vec(states)), "f": cost, "g": ca.vertcat(*defects)}
        options: dict[str, Any] = {
            "ipopt.print_level": 0,
            "print_time": 0,
            "ipopt.sb": "yes",
            "show_eval_warnings": False,
        }
        self.solver = ca.nlpsol("fit", "ipopt", problem, options | {"ipopt.tol": 1e-6, "ipopt.max_iter": 200})
        self.p, first = p, torch.zeros(stages, n, dtype=torch.float64)
        first[:, list(example.observed)] = data.observations[0, ::length]
        self.first = first.reshape(-1)
        self.build_seconds = time.process_time() - begin

    def _mapped(self, ca: Any, step: Any, example: Example, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
        """The same problem by one function mapped over the stages: an expanded graph of many steps takes gigabytes."""
        n, p, length, count = sizes
        observed = list(example.observed)

        def stage(samples: int) -> Any:
            start, t, y = ca.SX.sym("z", n), ca.SX.sym("t", p), ca.SX.sym("y", len(observed), samples)
            z, cost = start, 0
            for i in range(samples):
                cost += ca.sumsqr((z[observed] - y[:, i]) / example.noise) / 2
                z = step(z, t, 0.0)
            return ca.Function("stage", [start, t, y], [z, cost])

        whole, rest = divmod(count, length)
        states, theta = ca.MX.sym("states", n, whole + bool(rest)), ca.MX.sym("theta", p)
        y = ca.DM(self.y.T)
        repeated = ca.repmat(theta, 1, whole)
        ends, costs = stage(length).map(whole)(states[:, :whole], repeated, y[:, : whole * length])
        cost = ca.sum2(costs)
        if rest:
            cost += stage(rest)(states[:, whole], theta, y[:, whole * length :])[1]
        defects = ends[:, : states.shape[1] - 1] - states[:, 1:]
        return {"x": ca.vertcat(theta, ca.vec(states)), "f": cost, "g": ca.vec(defects)}

    def solve(self, guess: Tensor, limit: float | None = None) -> tuple[Tensor, float, float]:
        """Parameters, iterations and seconds from one guess."""
        begin = time.process_time()
        found = self.solver(x0=torch.cat([guess, self.first]).numpy(), lbg=0, ubg=0)
        theta = torch.tensor(found["x"].full().ravel()[: self.p])
        return theta, float(self.solver.stats()["iter_count"]), time.process_time() - begin


def casadi(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """CasADi and IPOPT with stages of 5 samples (1 for the map), guess after guess until the budget is spent."""
    solver = Ipopt(example, seed, 1 if example.name == "logistic" else 5)
    found: list[Tensor] = []
    counts: list[float] = []
    times: list[float] = []
    begin = time.process_time()
    for guess in guesses:
        if found and time.process_time() - begin > budget:
            break
        theta, iterations, seconds = solver.solve(guess)
        found.append(theta)
        counts.append(iterations)
        times.append(seconds)
    return Outcome(torch.stack(found), counts, times, f"building took {solver.build_seconds:.1f} s more")
