"""Buffers that change in train mode: counters beside writes of both modes, norms whose output nobody reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.frontend.sameness import right_or_refused


class Counting(nn.Module):
    """Counts its calls in train mode."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("count", torch.zeros(()))


class BesideAWrite(Counting):
    """The counter and a tensor of both modes are added to by the same operation."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        if self.training:
            self.count += 1
        h.detach().add_(0.1)
        return self.a(h)


class BesideASum(Counting):
    """The counter is replaced by a sum, ahead of another sum."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            self.count = self.count + 1
        h = h + x
        h.detach().mul_(0.5)
        return torch.tanh(h) + h


class UnreadNorm(Counting):
    """A norm keeps the means of a value that goes nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            self.count += 1
        self.norm(h)
        return torch.tanh(h)


class Inferring(Counting):
    """A frozen teacher in inference mode: nothing behind it has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        with torch.inference_mode():
            taught = torch.tanh(self.a(x))
        return self.a(x) + taught


@pytest.mark.parametrize("kind", [BesideAWrite, BesideASum, UnreadNorm, Inferring])
def test_buffers_change_as_in_the_model(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert right_or_refused(kind(), torch.randn(4, 6), sizes=(2, 3, 5)) == ""
