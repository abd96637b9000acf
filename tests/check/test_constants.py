"""Numbers that stand in a forward are the same numbers in float64, in the model and in its graph."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lagcompile as lc


class Scaled(nn.Module):
    """A layer, scaled by constants."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.mask: Tensor | None = None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x) * self.scales())

    @abstractmethod
    def scales(self) -> Tensor:
        """Numbers made in the forward."""


class Written(Scaled):
    def scales(self) -> Tensor:
        return torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.7])


class Computed(Scaled):
    def scales(self) -> Tensor:
        return torch.exp(torch.arange(6) * -0.3) + torch.hann_window(6)


class Cached(Scaled):
    def scales(self) -> Tensor:
        if self.mask is None:
            self.mask = torch.linspace(0.1, 1.0, 6)
        return self.mask


class CachedInCounting(Cached):
    """torch.fx cannot trace this."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", [Written, Computed, Cached, CachedInCounting])
def test_constants_are_certified(kind: Callable[[], Scaled], called: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = kind().to(dtype), torch.randn(4, 6, dtype=dtype)
    if called:
        model(x)
    before = model.mask
    lifted = lc.lift(model, x, split=1)
    assert model.mask is before
    certificate = lifted.verify(x, torch.zeros(4, 6), loss=functional.mse_loss)
    assert certificate.ok, str(certificate)
