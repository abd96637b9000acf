"""Small networks that several tests lift."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A skip over a breakpoint, a tied weight, a mask and a size that follow from the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 12)
        self.third.weight = self.second.weight
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = x.sum(1, keepdim=True) > 0
        h = torch.tanh(self.first(x))
        z = torch.tanh(self.second(h)) + h
        z = torch.where(mask, self.third(z), z).view(x.size(0), -1)
        return self.last(torch.sigmoid(z) + h)


class Normalised(nn.Module):
    """Batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(h.flatten(1)))


def deep(depth: int, width: int = 5, seed: int = 0) -> nn.Sequential:
    """Equal layers that stack into one batched call."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers)


def classes(examples: int, features: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (examples, features) and class numbers in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, features, generator=generator)
    return x, torch.arange(examples) % count
