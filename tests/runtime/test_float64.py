"""What runs in float64 is what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lagcompile.runtime.float64 import in_float64


@pytest.mark.parametrize(
    ("groups", "channels", "kernel", "settings"),
    [
        (8, (8, 16), (3, 3), {"padding": 1}),
        (6, (6, 6), (7, 7), {"stride": 2, "padding": (3, 2), "dilation": (1, 2)}),
        (4, (16, 8), (3, 1), {"stride": (2, 1)}),
        (2, (4, 6), (1, 1), {"bias": False}),
        (3, (3, 3), (3, 3), {"padding": "same"}),
        (3, (3, 3), (3, 3), {"padding": 1, "padding_mode": "circular"}),
    ],
)
def test_grouped_convolutions(
    groups: int, channels: tuple[int, int], kernel: tuple[int, int], settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, kernel, groups=groups, **settings).double()
    x = torch.randn(3, channels[0], 16, 17, dtype=torch.float64, requires_grad=True)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return y, *torch.autograd.grad((y * y.sin()).sum(), [x, *layer.parameters()])

    expected = gradients(layer(x))
    with in_float64():
        found = gradients(layer(x))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
