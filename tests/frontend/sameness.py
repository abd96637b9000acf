"""Is a lifted network the model? Asked as a user would: by calling both, on other data, weights, modes and sizes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.frontend.structure import leaves, opened

Change = Callable[[Tensor], Tensor]
CHANGES: tuple[Change, ...] = (
    lambda x: x,
    lambda x: -x,
    lambda x: 3 * x.flip(0) - 1,
    torch.zeros_like,
    lambda x: 1e3 * abs(x),
)


def right_or_refused(
    model: nn.Module,
    x: Tensor,
    *,
    sizes: Sequence[int] = (1, 2, 3, 5, 8),
    split: int | None = None,
    tolerance: float = 1e-4,
    changes: Sequence[Change] = CHANGES,
) -> str:
    """Lift a model and compare it in every way; the refusal's text, '' where it was captured.

    A call that raises `LiftError` or `BindError` is a refusal, too: of that batch size, say.
    """
    before = copy.deepcopy(model.state_dict())
    try:
        lifted = lc.lift(model, x, split=split)
    except lc.LiftError as error:
        return str(error)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert lifted.receipt is not None
    assert lifted.receipt.ok
    refused: dict[str, None] = {}
    for varied in (False, True):
        for training in (False, True):
            for size in sizes:
                for change in changes:
                    given = change(x.repeat(size, *(1 for _ in x.shape[1:]))[:size])
                    compare(copy.deepcopy(model), lifted, given, training, varied, tolerance, refused)
    return "; ".join(refused)


def compare(
    twin: nn.Module,
    lifted: lc.Lifted,
    x: Tensor,
    training: bool,
    varied: bool,
    tolerance: float,
    refused: dict[str, None],
) -> None:
    """One call of both, with gradients and buffers."""
    again = copy.deepcopy(lifted).train(training)
    twin.train(training)
    if varied:
        torch.manual_seed(3)
        for p, q in zip(twin.parameters(), again.module.parameters(), strict=True):
            p.data = q.data = p.detach() * (1 + 0.3 * torch.rand_like(p)) + 0.05 * torch.rand_like(p)
            q.data = q.data.clone()
    try:
        _seed()
        expected = twin(x.clone())
    except Exception:
        return  # the model itself does not run so (batch norm with one row, for one)
    try:
        _seed()
        got = again(x.clone())
    except (lc.LiftError, lc.BindError) as error:
        refused[str(error)] = None
        return
    where = f"training={training} varied={varied} shape={tuple(x.shape)}"
    pairs = list(zip(leaves(opened(expected)), leaves(opened(got)), strict=True))
    for a, b in pairs:
        assert near(a, b, tolerance), f"output differs: {where}"
    for (name, a), b in zip(twin.state_dict().items(), again.module.state_dict().values(), strict=True):
        assert near(a, b, tolerance), f"{name} differs: {where}"
    left, right = _slopes(expected, twin), _slopes(got, again.module)
    scale = max((float(g.abs().max()) for g in left.values() if g.numel()), default=0.0)
    for name, g in left.items():
        off = float((g - right[name]).abs().max()) if g.numel() else 0.0
        assert not off > tolerance * max(scale, 1e-30), f"gradient of {name} differs by {off:.1e}: {where}"


def _seed() -> None:
    torch.manual_seed(5)
    random.seed(5)


def near(a: Any, b: Any, tolerance: float) -> bool:
    """Equal up to rounding, NaN at the same places only."""
    if not isinstance(a, Tensor):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(a.detach().nan_to_num().abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _slopes(output: Any, model: nn.Module) -> dict[str, Tensor]:
    values = [v for v in leaves(opened(output)) if isinstance(v, Tensor) and v.is_floating_point() and v.requires_grad]
    weights = dict(model.named_parameters())
    trained = [n for n, p in weights.items() if p.requires_grad]
    if not values or not trained:
        return {n: torch.zeros(()) for n in weights}
    torch.manual_seed(9)
    total = sum((v * torch.randn_like(v)).sum() for v in values)
    found = torch.autograd.grad(total, [weights[n] for n in trained], allow_unused=True)  # type: ignore[arg-type]
    return {
        n: torch.zeros(()) if g is None else g  # type: ignore[redundant-expr]
        for n, g in zip(trained, found, strict=True)
    }
