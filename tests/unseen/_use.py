"""What users do with a lifted module: a certificate of it, and a few steps of the default method.

In: a lifted module, the model with the same weights, its source. Invariant: what cannot be certified has a reason that
is true of the source or of the numbers; a solution is finite, and its weights moved where the loss asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lagcompile as lc
from tests.unseen._nets import tensors_of

STEPS = 2
ENDS = {lc.Status.STEPS_DONE, lc.Status.WORSE, lc.Status.DIVERGED}
STOPS = re.compile(r"detach|\.data|no_grad|set_grad_enabled|inference_mode|Straight|Scaled|round|checkpoint")
"""Words of a source behind which a gradient need not be the derivative."""


def loss(output: Any, target: Tensor) -> Tensor:
    """Reads every floating-point tensor of an output."""
    found = [t for t in tensors_of(output) if t.is_floating_point()]
    return torch.stack(
        [0.0 * target.mean(), *(torch.sin(t.double() + 0.1 * i).mean() for i, t in enumerate(found))]
    ).sum()


def use(lifted: lc.Lifted, model: nn.Module, source: str, inputs: tuple[Tensor, ...]) -> Mapping[str, int]:
    """Verify, solve.

    Args:
        lifted: the lifted model.
        model: the model, with the same weights and buffers.
        source: its source.
        inputs: a batch.
    """
    target = torch.zeros(len(inputs[0]), dtype=torch.float64)
    certificate = lifted.verify(inputs, target, loss=loss)
    wrong = [r for r in certificate.residuals if not r.ok]
    assert not wrong, f"verify: {wrong[0]}"
    runs = {mode: _run(model.train(mode == "train"), inputs, target) for mode in certificate.modes}
    for reason in certificate.reasons:
        assert _true(reason, source, runs), f"verify: a reason that is not true: {reason}"
    before = {n: p.detach().clone() for n, p in lifted.module.named_parameters()}
    solution = lifted.solve((inputs, target), loss=loss, options=lc.RunOptions(steps=STEPS))
    assert solution.status in ENDS, solution.status
    after = dict(solution.model.named_parameters())
    for name, value in solution.model.state_dict().items():
        assert torch.isfinite(value).all(), f"solve: {name} is not finite"
    last = set(lifted.network.stages[-1].weights) - {w for s in lifted.network.stages[:-1] for w in s.weights}
    asked = [n for n in sorted(last & before.keys()) if all(bool((g[n] != 0).any()) for _, g in runs.values())]
    moved = [n for n, p in before.items() if not torch.equal(p, after[n])]
    assert moved or not asked, f"solve: no weight moved, although the loss asks {asked} to"
    return {"certified": int(certificate.ok), "used": 1}


Run = tuple[bool, Mapping[str, Tensor]]
"""Whether the output has numbers other than zero; gradients of the loss in the parameters."""


def _run(model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Run:
    parameters = dict(model.named_parameters())
    torch.manual_seed(0)
    output = model(*(t.clone() for t in inputs))
    value, given = loss(output, target), any(bool(t.any()) for t in tensors_of(output))
    found: Sequence[Tensor | None] = [None] * len(parameters)
    if value.requires_grad:
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    slopes = zip(parameters.items(), found, strict=True)
    return given, {n: torch.zeros_like(p) if g is None else g for (n, p), g in slopes}


def _true(reason: str, source: str, runs: Mapping[str, Run]) -> bool:
    """Whether a reason for no certificate can be seen in the source or in the numbers."""
    if "the gradient is not the derivative" in reason:
        return STOPS.search(source) is not None
    kind, found, mode = reason.partition(" mode compares nothing but zeros")[0].rpartition(" in ")
    if not found:
        return False
    given, slopes = runs[mode]
    if kind in {"forward", "weight gradient"}:
        return not (given if kind == "forward" else any(bool(g.any()) for g in slopes.values()))
    return kind in {"adjoint", "state stationarity", "defect"}
