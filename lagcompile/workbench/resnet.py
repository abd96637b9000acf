"""Residual convolutional networks (He et al. 2016): the deep models of the capture benchmark and of CIFAR-10.

In: a depth, a width and a number of classes. Out: a plain, symbolically traceable `nn.Module` that returns logits.
Invariant: the count of weighted layers on the longest path (convolutions and the affine output) is the depth.
"""

# ruff: noqa: D102 (what a forward takes and returns is said in its class)
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

from torch import Tensor, nn

Depth: TypeAlias = Literal[8, 20, 50, 152]

# Blocks per group: three groups of plain blocks for 32 x 32 images, four of bottlenecks for large ones.
_GROUPS: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {8: (1, 1, 1), 20: (3, 3, 3), 50: (3, 4, 6, 3), 152: (3, 8, 36, 3)}
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection; the first may halve the image."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.skip = _skip(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.skip(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a skip connection; the output has four times the inner width."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(4 * width)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.relu3 = nn.ReLU()
        self.skip = _skip(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        return self.relu3(self.norm3(self.conv3(y)) + self.skip(x))


class ResNet(nn.Module):
    """A residual network for colour images [N, 3, H, W]; logits [N, classes].

    Args:
        depth: 8 or 20 (plain blocks, for 32 x 32 images; default width 16), 50 or 152 (bottlenecks after a 7x7
            convolution and a pooling, for images of at least 32 x 32; default width 64).
        width: channels of the first group.
        classes: number of classes.

    Raises:
        ValueError: a depth that is not offered.
    """

    def __init__(self, depth: Depth = 20, width: int | None = None, classes: int = 10) -> None:
        super().__init__()
        if depth not in _GROUPS:
            raise ValueError(f"depth: expected one of {', '.join(map(str, _GROUPS))}, got {depth}")
        groups = _GROUPS[depth]
        large = len(groups) == 4
        width = width or (64 if large else 16)
        self.stem = _large_stem(width) if large else _small_stem(width)
        blocks: list[nn.Module] = []
        inputs = width
        for group, count in enumerate(groups):
            inner = width * 2**group
            for index in range(count):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(Bottleneck(inputs, inner, stride) if large else BasicBlock(inputs, inner, stride))
                inputs = 4 * inner if large else inner
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.blocks(self.stem(x)))))


def _small_stem(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def _large_stem(width: int) -> nn.Sequential:
    convolution = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))


def _skip(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
