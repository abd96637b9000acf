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

from lagcompile.backends.shooting import Shooting, fit
from lagcompile.backends.shooting_gradient import ShootingExtragradient, extragradient
from lagcompile.backends.shooting_problem import Bounds, Problem
from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.stages import Stages
from lagcompile.dynamics.starts import observation_map, parameter_scale, state_scale, states_from_observations
from lagcompile.dynamics.systems import Example


@dataclass(frozen=True)
class Outcome:
    """Parameters (guesses, p), iterations of each guess, and seconds for all of them together.

    Attributes:
        theta: parameters reached; where a method had no time left, the guess.
        iterations: per guess.
        seconds: per guess: its own time, or the whole run divided by the guesses where they run together.
        note: what a reader should know.
    """

    theta: Tensor
    iterations: list[float]
    seconds: list[float]
    note: str = ""


Method = Callable[[Example, int, Tensor, float], Outcome]


def _setup(example: Example, seed: int, length: int) -> tuple[Problem, Tensor]:
    """Problem with stages of one length, and states along the data as the observations suggest them."""
    functions, data = CellFunctions(example.rollout()), example.data(seed)
    weights = torch.full((data.outputs,), 1.0 / example.noise, dtype=torch.float64)
    path = states_from_observations(data, observation_map(functions.rollout, data), functions.n)[None]
    stages = Stages(functions, data, length, weights)
    bounds = Bounds.of(functions, {}, {})
    return Problem(functions, data, stages, weights, state_scale(path, data), bounds), path


def sqp(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """This project's Gauss-Newton SQP with default options, all guesses in one run."""
    begin = time.process_time()
    result = fit(example.rollout(), example.data(seed), starts=guesses, noise=example.noise)
    spent = time.process_time() - begin
    each = spent / len(guesses)
    return Outcome(
        result.theta,
        result.iterations.double().tolist(),
        [each] * len(guesses),
        f"stages of {result.stage_length}, all guesses in {spent:.2f} s",
    )


def first_order(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """This project's augmented-Lagrangian extragradient on the stages that the SQP method chooses."""
    probe = fit(
        example.rollout(),
        example.data(seed),
        starts=guesses[:8],
        noise=example.noise,
        method=Shooting(iterations=1),
    )
    problem, path = _setup(example, seed, probe.stage_length)
    begin = time.process_time()
    states = path[:, :, :: probe.stage_length].expand(len(guesses), -1, -1, -1)
    result = extragradient(problem, ShootingExtragradient(time_limit=budget), guesses, states, clock=time.process_time)
    each = (time.process_time() - begin) / len(guesses)
    note = f"{result.steps} of 2000 steps"
    return Outcome(result.point.theta, [float(result.steps)] * len(guesses), [each] * len(guesses), note)


def _descend(
    loss: Callable[[Tensor, Tensor], Tensor], guesses: Tensor, extra: Tensor, scale: Tensor, budget: float
) -> tuple[Tensor, int]:
    """Adam on scaled parameters and a second group of variables, all guesses together; keeps each one's best loss."""
    z, w = (guesses / scale).requires_grad_(True), extra.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z, w], lr=0.02)
    best, kept = torch.full((len(guesses),), float("inf"), dtype=torch.float64), guesses.clone()
    begin, steps = time.process_time(), 0
    while time.process_time() - begin < budget and steps < 2000:
        values = loss(z * scale, w)
        better = values.detach() < best
        best = torch.where(better, values.detach(), best)
        kept[better] = (z.detach() * scale)[better]
        grads = torch.autograd.grad(values.nan_to_num(0.0, 0.0, 0.0).sum(), (z, w))
        for variable, gradient in zip((z, w), grads, strict=True):
            norm = gradient.flatten(1).norm(dim=1).clamp_min(1.0)
            shape = (-1, *[1] * (gradient.dim() - 1))
            variable.grad = torch.nan_to_num(gradient / norm.view(shape), 0.0, 0.0, 0.0)
        optimizer.step()
        steps += 1
    return kept, steps


def adam(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """Backprop through the whole rollout, Adam with clipped gradients, initial state free."""
    problem, path = _setup(example, seed, example.samples)

    def loss(theta: Tensor, x0: Tensor) -> Tensor:
        objective: Tensor = problem.evaluate(theta, x0).values.objective
        return objective

    begin = time.process_time()
    x0 = path[:, :, :1].expand(len(guesses), -1, -1, -1)
    scale = parameter_scale(problem.functions, guesses)
    theta, steps = _descend(loss, guesses, x0, scale, budget)
    each = (time.process_time() - begin) / len(guesses)
    return Outcome(theta, [float(steps)] * len(guesses), [each] * len(guesses), f"{steps} steps")


def lbfgs(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """Backprop through the whole rollout, L-BFGS with a strong-Wolfe search, one guess after the other."""
    problem, path = _setup(example, seed, example.samples)
    found, counts, times = guesses.clone(), [], []
    for i, guess in enumerate(guesses):
        begin = time.process_time()
        deadline = begin + budget / len(guesses)
        scale = parameter_scale(problem.functions, guess[None])
        z, x0 = (guess[None] / scale).requires_grad_(True), path[:, :, :1].clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([z, x0], max_iter=4, line_search_fn="strong_wolfe")
        best, evaluations = float("inf"), 0

        def closure(z: Tensor = z, x0: Tensor = x0, scale: Tensor = scale, i: int = i) -> Tensor:
            nonlocal best, evaluations
            value: Tensor = problem.evaluate(z * scale, x0).values.objective.sum()
            evaluations += 1
            if float(value.detach()) < best:
                best = float(value.detach())
                found[i] = (z * scale).detach()[0]
            grads = torch.autograd.grad(value, (z, x0))
            z.grad, x0.grad = (torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in grads)
            return value.nan_to_num(1e30, 1e30, 1e30)

        before = float("inf")
        while time.process_time() < deadline:
            optimizer.step(closure)
            if not best < before * (1 - 1e-9):
                break
            before = best
        counts.append(float(evaluations))
        times.append(time.process_time() - begin)
    return Outcome(found, counts, times, "iterations are evaluations")


def segments(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """Segments of 5 samples restarted from the data, jumps penalised by a fixed weight of 100, Adam; no free states."""
    problem, path = _setup(example, seed, 5)
    states = path[:, :, ::5].expand(len(guesses), -1, -1, -1)

    def loss(theta: Tensor, _: Tensor) -> Tensor:
        values = problem.evaluate(theta, states).values
        jumps = problem.scaled_defect(values).square().flatten(1).sum(1)
        total: Tensor = values.objective + 100.0 * jumps
        return total

    begin = time.process_time()
    none = torch.zeros(len(guesses), 1, dtype=torch.float64)

    def with_unused(theta: Tensor, unused: Tensor) -> Tensor:
        return loss(theta, unused) + 0.0 * unused.sum()

    theta, steps = _descend(with_unused, guesses, none, parameter_scale(problem.functions, guesses), budget)
    each = (time.process_time() - begin) / len(guesses)
    return Outcome(theta, [float(steps)] * len(guesses), [each] * len(guesses), f"{steps} steps")


def _field(ca: Any, name: str, x: Any, t: Any, u: Any) -> Any:
    fields: dict[str, Callable[[], Any]] = {
        "lorenz": lambda: ca.vertcat(t[0] * (x[1] - x[0]), x[0] * (t[1] - x[2]) - x[1], x[0] * x[1] - t[2] * x[2]),
        "van_der_pol": lambda: ca.vertcat(x[1], t[0] * (1 - x[0] ** 2) * x[1] - t[1] * x[0]),
        "pendulum": lambda: ca.vertcat(x[1], -t[0] * ca.sin(x[0]) - t[1] * x[1] + t[2] * u),
        "fitzhugh_nagumo": lambda: ca.vertcat(x[0] - x[0] ** 3 / 3 - x[1] + 0.5, t[2] * (x[0] + t[0] - t[1] * x[1])),
    }
    return fields[name]()


class Ipopt:
    """Multiple shooting in CasADi (fully expanded SX graph, exact Hessian) solved by IPOPT.

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
        problem: dict[str, Any] = {"x": ca.vertcat(theta, ca.vec(states)), "f": cost, "g": ca.vertcat(*defects)}
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

    def solve(self, guess: Tensor, limit: float | None = None) -> tuple[Tensor, float, float]:
        """Parameters, iterations and seconds from one guess."""
        begin = time.process_time()
        found = self.solver(x0=torch.cat([guess, self.first]).numpy(), lbg=0, ubg=0)
        theta = torch.tensor(found["x"].full().ravel()[: self.p])
        return theta, float(self.solver.stats()["iter_count"]), time.process_time() - begin


def casadi(example: Example, seed: int, guesses: Tensor, budget: float) -> Outcome:
    """CasADi and IPOPT with stages of 5 samples (1 for the map), guess after guess until the budget is spent."""
    solver = Ipopt(example, seed, 1 if example.name == "logistic" else 5)
    found, counts, times = guesses.clone(), [], []
    begin = time.process_time()
    for i, guess in enumerate(guesses):
        if time.process_time() - begin > budget:
            break
        found[i], iterations, seconds = solver.solve(guess)
        counts.append(iterations)
        times.append(seconds)
    note = f"{len(times)} of {len(guesses)} guesses in the budget; building took {solver.build_seconds:.1f} s more"
    return Outcome(found, counts, times, note)
