"""Arguments that are no tensors belong to the lifted model: data hold tensors only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import lagcompile as lc

X = torch.linspace(-1.0, 1.0, 36).reshape(6, 6)
Y = torch.arange(6) % 3
MASK = (torch.arange(48).reshape(6, 8) % 3 > 0).float()


class Asked(nn.Module):
    """A forward with a mask that may be missing, and settings."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, flip: bool = False) -> Tensor:
        h = scale * torch.relu(self.a(x))
        h = h if mask is None else h * mask
        return self.c(torch.tanh(self.b(h.flip(1) if flip else h)))


@pytest.mark.parametrize(
    ("args", "kwargs", "data"),
    [
        ((X, None), {}, X),
        ((X, None), {}, (X, None)),
        ((X,), {"scale": 2.0, "flip": True}, X),
        ((X, None, 3.0), {"flip": False}, (X,)),
        ((X, MASK), {"scale": 0.5}, (X, MASK)),
        ((), {"x": X, "mask": MASK, "flip": True}, (X, MASK)),
    ],
)
def test_what_is_no_tensor_is_kept(args: tuple[Any, ...], kwargs: Mapping[str, Any], data: Any) -> None:
    lifted = lc.lift(model := Asked(), args, split=3, example_kwargs=kwargs)
    assert torch.allclose(lifted(*args, **kwargs), model(*args, **kwargs), atol=1e-6)
    solution = lifted.solve((data, Y), loss=functional.cross_entropy, options=lc.RunOptions(steps=2))
    assert solution.certificate is not None
    assert solution.certificate.ok
    tensors = tuple(v for v in (data if isinstance(data, tuple) else (data,)) if v is not None)
    assert lifted.verify(tensors, Y, loss=functional.cross_entropy).ok


def test_a_call_without_an_argument_means_the_models_default() -> None:
    model = Asked()
    assert torch.allclose(lc.lift(model, (X, None, 1.0), split=2)(X), model(X), atol=1e-6)
    with pytest.raises(lc.BindError, match="the argument 'scale' is missing"):
        lc.lift(model, X, split=2, example_kwargs={"scale": 2.0})(X)
