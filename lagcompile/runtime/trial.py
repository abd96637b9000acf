"""The model and the loss tried on a few rows, before a run starts.

In: an instance. Out: nothing, or an error in the user's words. Invariant: buffers and modes are left as they were.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lagcompile.ir.base import BindError, ProgramError
from lagcompile.runtime.instance import Instance, quiet

ROWS = 2


def try_out(instance: Instance) -> None:
    """One forward pass and loss on the first rows.

    Raises:
        BindError: the model or the loss fails, or the loss is not one number.
        ProgramError: the loss reduces over examples otherwise than the formulation says.
    """
    rows = torch.arange(min(ROWS, instance.examples))
    try:
        loss = _loss(instance, rows)
    except Exception as error:
        raise BindError(f"the model or the loss fails on the first {len(rows)} examples: {error}") from error
    given: object = loss  # a user's function may return anything
    if not isinstance(given, Tensor) or given.numel() != 1:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise BindError(f"the loss must give one number for a batch, it gave {shape}")
    said, does = instance.program.objective.reduction, _reduction(instance, rows, float(loss))
    if does is not None and does != said:
        weight = "less" if said == "mean" else "more"
        raise ProgramError(
            f"the loss is a {does} over examples, but the formulation says 'reduction: {said}': defects would weigh "
            f"{weight} than the loss by the batch size; write 'reduction: {does}', or give a loss that is a {said}"
        )


def _reduction(instance: Instance, rows: Tensor, once: float) -> str | None:
    """What the loss does when every row stands twice; None where that does not tell."""
    if instance.examples == 1 or not math.isfinite(once) or abs(once) < 1e-12:
        return None  # one example: mean and sum are the same
    try:
        growth = float(_loss(instance, rows.repeat(2))) / once
    except Exception:  # a model of one batch size
        return None
    names = {"mean": 1.0, "sum": 2.0}
    return next((name for name, ratio in names.items() if math.isclose(growth, ratio, rel_tol=1e-4)), None)


def _loss(instance: Instance, rows: Tensor) -> Tensor:
    with torch.no_grad(), quiet(instance.module):
        batch = instance.batch(rows)
        _, values = instance.forward(batch)
        return instance.loss(instance.output(values), batch.target)
