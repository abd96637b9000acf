"""Small named networks: what specs, examples, tests and benchmarks train.

In: sizes. Out: plain `nn.Module`s that return logits (or values), with nothing of lagcompile in them. Invariant: every
forward is symbolically traceable: no branch on values, no shape read from the data, no random numbers but dropout.
"""

# ruff: noqa: D102 (what a forward takes and returns is said in its class)
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Activation: TypeAlias = Literal["relu", "tanh", "sigmoid", "softplus", "gelu", "silu", "leaky_relu"]
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "relu": nn.ReLU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "softplus": nn.Softplus,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "leaky_relu": nn.LeakyReLU,
    }
)


class DigitsConvNet(nn.Module):
    """Two convolutions and two affine layers for images [N, 1, 8, 8]; logits [N, classes]."""

    def __init__(self, channels: int = 16, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(2 * channels * 16, hidden)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.flatten(self.pool(self.relu2(self.conv2(x))))
        return self.fc2(self.relu3(self.fc1(x)))


class MnistConvNet(nn.Module):
    """The network of PyTorch's MNIST example, without its dropout, for images [N, 1, 28, 28]; logits [N, classes].

    ExtraProp and DistProp were published on it, cut after `relu3`: 128 state entries per example.
    """

    def __init__(self, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(9216, hidden)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.flatten(self.pool(self.relu2(self.conv2(x))))
        return self.fc2(self.relu3(self.fc1(x)))


def _channels_last(module: nn.Module) -> None:
    """Filters in the order that takes a fifth off a step where channels are few."""
    for p in module.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


class MnistConvNetSmall(nn.Module):
    """A cheap LeNet for images [N, 1, 28, 28]: about a tenth of the time of `MnistConvNet`; logits [N, classes]."""

    def __init__(self, channels: int = 8, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(2 * channels * 16, hidden)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, classes)
        _channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        # Pooling before the ReLU gives the same values for a quarter of the work.
        x = self.relu1(self.pool1(self.conv1(x)))
        x = self.relu2(self.pool2(self.conv2(x)))
        return self.fc2(self.relu3(self.fc1(self.flatten(x))))


class LeNet5(nn.Module):
    """LeNet-5 for colour images [N, 3, 32, 32]; logits [N, classes].

    ExtraProp and DistProp were published on it, cut after `relu4`: 84 state entries per example.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(400, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, classes)
        _channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(self.flatten(x)))
        return self.fc3(self.relu4(self.fc2(x)))


class MLP(nn.Module):
    """Affine layers with an activation between them; inputs of any shape are flattened to [N, widths[0]].

    Args:
        widths: sizes from the input to the output, at least two.
        activation: a key of `ACTIVATIONS`.
        bias: whether the affine layers have one.
        batch_norm: a BatchNorm1d between each hidden affine layer and its activation.

    Raises:
        ValueError: fewer than two widths, or an activation that is not known.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        activation: Activation = "relu",
        bias: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected at least an input and an output size, got {list(widths)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths[:-1]):
            layers.append(nn.Linear(inputs, outputs, bias=bias))
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(_activation(activation))
        layers.append(nn.Linear(widths[-2], widths[-1], bias=bias))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TanhNet(nn.Module):
    """A plain deep tanh network: `depth` hidden layers of equal width, then an affine output; inputs are flattened.

    Args:
        depth: number of hidden layers, at least one.
        width: entries of each.
        inputs: entries of one flattened input.
        outputs: entries of the output.
        gain: of orthogonal first weights, with biases of zero (Saxe et al. 2014): about 1, a deep net neither dies nor
            explodes; None for PyTorch's own, with which signals die within some tens of layers.

    Raises:
        ValueError: a depth below one.
    """

    def __init__(
        self, depth: int, width: int, *, inputs: int = 784, outputs: int = 10, gain: float | None = None
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth: expected at least 1 hidden layer, got {depth}")
        self.flatten = nn.Flatten()
        sizes = [inputs] + [width] * depth
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes))
        self.output = nn.Linear(width, outputs)
        if gain is not None:
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight, gain)
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        for layer in self.hidden:
            x = layer(x)
        return self.output(x)


class ResidualBlock(nn.Module):
    """x + W2 act(W1 x) on [N, width]."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.activation = _activation(activation)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.activation(self.fc1(x)))


class ResidualMLP(nn.Module):
    """An affine input layer, `depth` residual blocks of equal width, an affine output; inputs are flattened."""

    def __init__(
        self, depth: int, width: int, *, inputs: int = 784, outputs: int = 10, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.input = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width, activation) for _ in range(depth)))
        self.output = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.blocks(self.input(self.flatten(x))))


class StraightThroughSign(nn.Module):
    """sign(x) in the forward pass, the identity in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        # x - x is exactly zero, so that the values are exactly -1, 0 and 1.
        return torch.sign(x).detach() + (x - x.detach())


class SignNet(nn.Module):
    """The binary network of online AltMin (Choromanska et al. 2019): two hidden layers, the first one's output a sign.

    Hidden activations: Dropout, tanh, sign (straight through); then Dropout, tanh. Inputs are flattened.
    """

    def __init__(
        self, width: int = 500, *, inputs: int = 784, classes: int = 10, dropout: float = 0.2, bias: bool = False
    ) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(inputs, width, bias=bias)
        self.act1 = nn.Sequential(nn.Dropout(dropout), nn.Tanh(), StraightThroughSign())
        self.fc2 = nn.Linear(width, width, bias=bias)
        self.act2 = nn.Sequential(nn.Dropout(dropout), nn.Tanh())
        self.fc3 = nn.Linear(width, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.fc1(self.flatten(x)))
        return self.fc3(self.act2(self.fc2(x)))


class SelfAttention(nn.Module):
    """Multi-head attention of [N, T, width] over itself; `padding` [N, T] is true where a token is to be ignored."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / (q.size(-1) ** 0.5)
        weights = scores.masked_fill(padding[:, None, None, :], float("-inf")).softmax(-1)
        return self.output((weights @ v).transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Pre-norm attention and a two-layer network, each with its residual connection."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), padding))
        return x + self.dropout(self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)))))


class SmallTransformer(nn.Module):
    """A classifier of token sequences: int64 [N, length] -> logits [N, classes].

    The padding mask (token 0) and the positions follow from the input alone and are read by every layer: what a cut
    must pass to each stage as data, not as a state.
    """

    positions: Tensor

    def __init__(
        self,
        *,
        vocabulary: int = 32,
        length: int = 12,
        width: int = 16,
        heads: int = 2,
        layers: int = 3,
        classes: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)
        self.register_buffer("positions", torch.arange(length))
        self.layers = nn.ModuleList(TransformerLayer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.embedding(tokens) + self.position_embedding(self.positions)
        for layer in self.layers:
            x = layer(x, padding)
        return self.output(self.norm(x).mean(1))


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}")
    return ACTIVATIONS[name]()
