"""Losses that are known to be convex in the output, in cvxpy's words.

In: a torch loss, its target, the output's shape. Out: `ConvexLoss`. Invariant: a loss is recognised by being the torch
function or module itself; nothing is guessed from a name or from samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lagcompile.ir.base import ProgramError

LOSSES = "mse_loss, l1_loss, huber_loss, smooth_l1_loss, cross_entropy, binary_cross_entropy_with_logits"


class ConvexLoss:
    """A loss that cvxpy knows: its name, and the expression of an affine output."""

    def __init__(self, name: str, expression: Callable[[Any, Any], Any]) -> None:
        self.name = name
        self.expression = expression


def convex_loss(loss: Any, target: Any, shape: tuple[int, ...], name: str) -> ConvexLoss:
    """The cvxpy form of a loss.

    Raises:
        ProgramError: it is not one of the losses that are known to be convex.
    """
    known: dict[Any, str] = {
        F.mse_loss: "mse", F.l1_loss: "l1", F.huber_loss: "huber", F.smooth_l1_loss: "huber",
        F.cross_entropy: "cross_entropy", F.binary_cross_entropy_with_logits: "logistic",
    }  # fmt: skip
    modules: dict[type[nn.Module], str] = {
        nn.MSELoss: "mse", nn.L1Loss: "l1", nn.CrossEntropyLoss: "cross_entropy", nn.BCEWithLogitsLoss: "logistic",
    }  # fmt: skip
    kind = modules.get(type(loss)) if isinstance(loss, nn.Module) else known.get(loss)
    reduction = str(loss.reduction) if isinstance(loss, nn.Module) else "mean"
    plain = not isinstance(loss, nn.Module) or not any(True for _ in loss.buffers())
    if isinstance(loss, nn.CrossEntropyLoss) and (loss.label_smoothing or loss.ignore_index != -100):
        plain = False
    if kind is None or reduction not in {"mean", "sum"} or not plain:
        raise ProgramError(f"the loss '{name}' is not known to be convex here (known: {LOSSES}): use sqp")
    count = shape[0] if kind == "cross_entropy" else int(np.prod(shape))
    share = 1.0 / count if reduction == "mean" else 1.0
    if kind == "cross_entropy":
        integral = isinstance(target, Tensor) and not target.is_floating_point() and len(shape) == 2
        if not integral:
            raise ProgramError(f"the loss '{name}' is known to be convex here for class numbers and (rows, classes)")
        return ConvexLoss(name, lambda cp, out: share * _cross_entropy(cp, out, target.numpy(), shape))
    y = target.reshape(-1).double().numpy()
    forms: dict[str, Callable[[Any, Any], Any]] = {
        "mse": lambda cp, out: share * cp.sum_squares(out - y),
        "l1": lambda cp, out: share * cp.norm1(out - y),
        "huber": lambda cp, out: (0.5 * share) * cp.sum(cp.huber(out - y, 1.0)),
        "logistic": lambda cp, out: share * (cp.sum(cp.logistic(out)) - y @ out),
    }
    return ConvexLoss(name, forms[kind])


def _cross_entropy(cp: Any, out: Any, labels: Any, shape: tuple[int, ...]) -> Any:
    rows, classes = shape
    table = cp.reshape(out, (rows, classes), order="C")
    hot = np.zeros((rows, classes))
    hot[np.arange(rows), labels] = 1.0
    return cp.sum(cp.log_sum_exp(table, axis=1)) - cp.sum(cp.multiply(hot, table))
