"""Runs that may go wrong: random networks, scales of data, methods and step sizes up to 1e20.

What comes back is finite, and does no worse than the start unless the status says so; each status is true.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc

CI, NIGHTLY = 60, 2000
SLACK = 1e-4
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.Tanh, nn.Softplus, nn.Sigmoid, nn.GELU)
TRANSIENT: Mapping[str, Any] = {"storage": lc.Transient(), "multiplier": None}
PENALTY = lc.ConstantWeight(value=0.5)
Rule = Callable[[float], Any]
RULES: tuple[Rule, ...] = (
    lambda lr: lc.SGD(lr=lr),
    lambda lr: lc.Adam(lr=lr),
    lambda lr: lc.Adagrad(lr=lr),
)
METHODS: Mapping[str, tuple[Callable[[Any], lc.Method], Mapping[str, Any]]] = {
    "extragradient": (lambda r: lc.Extragradient(weights=r), {}),
    "states": (lambda r: lc.Extragradient(states=r), {}),
    "multipliers": (lambda r: lc.Extragradient(multipliers=r), {"multiplier": {"start": "adjoint"}}),
    "from the past": (lambda r: lc.ExtragradientFromPast(weights=r, states=r), {}),
    "optimistic": (lambda r: lc.OptimisticGradient(weights=r), {}),
    "descent ascent": (lambda r: lc.DescentAscent(weights=r, multipliers=r), {"weight": PENALTY}),
    "augmented": (lambda r: lc.AugmentedLagrangian(weights=r), {"weight": lc.AugmentedWeight(value=1.0)}),
    "backprop": (lambda r: lc.Backprop(weights=r), {}),
    "dfa": (lambda r: lc.FeedbackAlignment(weights=r), TRANSIENT),
    "dtp": (lambda r: lc.DifferenceTargetPropagation(weights=r), TRANSIENT),
    "altmin": (lambda r: lc.AltMin(weights=r), {**TRANSIENT, "weight": PENALTY}),
    "proxprop": (lambda r: lc.ProxProp(weights=r), TRANSIENT),
}


def network(draw: random.Random, classes: int) -> tuple[nn.Module, int]:
    """A small network and its number of inputs."""
    torch.manual_seed(draw.randrange(2**31))
    widths = [draw.randint(1, 6) for _ in range(draw.randint(2, 4))]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers.append(nn.Linear(before, after))
        if draw.random() < 0.3:
            layers.append(nn.BatchNorm1d(after))
        layers.append(draw.choice(ACTIVATIONS)())
        if draw.random() < 0.2:
            layers.append(nn.Dropout(0.2))
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes)), widths[0]


def case(seed: int) -> Mapping[str, int]:
    """One run."""
    draw = random.Random(seed)
    classes, rows = draw.randint(1, 3), draw.randint(4, 48)
    model, features = network(draw, classes)
    x = torch.randn(rows, features) * 10 ** draw.uniform(-6, 6)
    labels = classes > 1 and draw.random() < 0.6
    y = torch.arange(rows) % classes if labels else torch.randn(rows, classes) * 10 ** draw.uniform(-6, 6)
    loss = F.cross_entropy if labels else F.mse_loss
    padded = labels and draw.random() < 0.2
    if padded:  # a block of rows that the loss leaves out
        y = torch.where(torch.arange(rows) < draw.randint(0, rows), -100, y)
    name = draw.choice(list(METHODS))
    method, formulation = METHODS[name]
    rule = draw.choice(RULES)(10 ** draw.uniform(-4, draw.choice((0, 20))))
    options = lc.RunOptions(
        steps=draw.randint(0, 12),
        batch_size=draw.choice([b for b in range(3, rows + 1) if rows % b != 1]),  # batch normalisation refuses one row
        look_every=draw.choice((1, 3, 50)),
        seed=seed % 1000,
        time_limit=draw.choice((None, None, None, 1e-9)),
    )
    try:
        lifted = lc.lift(model, x[:4], split=draw.randint(1, 2), formulation=lc.Formulation(**formulation))
        solution = lifted.solve((x, y), loss=loss, method=method(rule), options=options)
    except lc.LagcompileError as error:
        return {"padding refused" if padded and "NaN" in str(error) else "refused": 1}
    return {solution.status.name.lower(): 1, **promised(model, solution, x, y, loss, options)}


def promised(
    model: nn.Module, solution: lc.Solution, x: Tensor, y: Tensor, loss: Callable[..., Tensor], options: lc.RunOptions
) -> Mapping[str, int]:
    """What every run promises."""
    before, after = value(model, x, y, loss), value(solution.model, x, y, loss)
    given = [*solution.model.state_dict().values(), *solution.states.values(), *solution.multipliers.values()]
    assert all(bool(torch.isfinite(t).all()) for t in given if t.is_floating_point()), "something is not finite"
    assert solution.certificate is not None
    assert solution.certificate.verdict != "failed", str(solution.certificate)
    if not math.isfinite(before):
        return {"start not finite": 1}
    assert math.isfinite(after), f"the loss is {after}, at the start {before}"
    if bool((y == -100).any()):  # means of batches weigh rows otherwise than the mean of all, which is taken here
        return {}
    if solution.status is lc.Status.WORSE:
        assert after > before * (1 - SLACK), f"said to be worse: {before} -> {after}"
    else:
        assert after <= before * (1 + SLACK), f"{solution.status.name}: {before} -> {after}"
    if solution.status is lc.Status.STEPS_DONE:
        assert solution.steps == options.steps
    return {}


def value(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> float:
    """The loss of all rows, in eval mode."""
    with torch.no_grad():
        return float(loss(copy.deepcopy(model).eval()(x), y))


def judge(tally: Mapping[str, int], cases: int) -> None:
    """All ends occur, and few cases are refused."""
    assert tally.get("refused", 0) <= 0.15 * cases, dict(tally)
    assert tally.get("start not finite", 0) <= 0.1 * cases, dict(tally)
    for status in ("steps_done", "worse", "diverged"):
        assert tally.get(status, 0) >= 0.03 * cases, dict(tally)
