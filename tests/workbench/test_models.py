"""The named networks: shapes, traceability, sizes, and what their docstrings promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from lagcompile.workbench import models
from lagcompile.workbench.references import MODELS
from lagcompile.workbench.resnet import ResNet

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "digits_convnet": (models.DigitsConvNet, (3, 1, 8, 8), 10),
    "lenet5": (models.LeNet5, (3, 3, 32, 32), 10),
    "mlp": (lambda: models.MLP((12, 7, 5, 3), activation="tanh", batch_norm=True), (4, 3, 4), 3),
    "mnist_convnet": (models.MnistConvNet, (2, 1, 28, 28), 10),
    "mnist_convnet_small": (models.MnistConvNetSmall, (3, 1, 28, 28), 10),
    "residual_mlp": (lambda: models.ResidualMLP(3, 6, inputs=5, outputs=2), (4, 5), 2),
    "resnet": (lambda: ResNet(8, width=4), (2, 3, 32, 32), 10),
    "resnet152": (lambda: ResNet(152, width=2, classes=5), (2, 3, 32, 32), 5),
    "sign_net": (lambda: models.SignNet(9, inputs=16), (3, 4, 4), 10),
    "small_transformer": (models.SmallTransformer, (3, 12), 4),
    "tanh_net": (lambda: models.TanhNet(10, 6, inputs=5, outputs=2), (4, 5), 2),
}


def example(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "small_transformer":
        return torch.randint(0, 32, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def test_every_short_name_is_covered() -> None:
    assert set(MODELS) - {"exported"} == set(CASES) - {"resnet152"}


@pytest.mark.parametrize("name", CASES)
def test_traces_gives_logits_and_moves_every_weight(name: str) -> None:
    build, shape, outputs = CASES[name]
    torch.manual_seed(0)
    model, x = build(), example(name, shape)
    traced = fx.symbolic_trace(model)
    model.eval()
    traced.eval()
    y = model(x)
    assert y.shape == (shape[0], outputs)
    assert torch.equal(traced(x), y)
    model.train()
    model(x).square().sum().backward()
    still = [key for key, weight in model.named_parameters() if weight.grad is None]
    assert not still


@pytest.mark.parametrize(
    ("model", "count"),
    [
        # 320 + 18,496 + 1,179,776 + 1,290: PyTorch's MNIST example.
        (models.MnistConvNet(), 1_199_882),
        # 456 + 2,416 + 48,120 + 10,164 + 850: LeNet-5 with three colour channels.
        (models.LeNet5(), 62_006),
    ],
)
def test_published_sizes(model: nn.Module, count: int) -> None:
    assert sum(weight.numel() for weight in model.parameters()) == count


@pytest.mark.parametrize("depth", [8, 20, 50, 152])
def test_a_resnet_has_as_many_layers_as_its_depth(depth: int) -> None:
    with torch.device("meta"):
        model = ResNet(depth, width=4)  # type: ignore[arg-type]
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len([name for name in layers if ".skip." not in name]) == depth


def test_resnet152_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        model = ResNet(152, classes=1000)
    assert sum(weight.numel() for weight in model.parameters()) == 60_192_808


def test_the_sign_is_exact_and_its_gradient_passes_through() -> None:
    x = torch.tensor([-0.3, 0.0, 1e-9, 0.7, -1e20], requires_grad=True)
    y = models.StraightThroughSign()(x)
    assert y.tolist() == [-1.0, 0.0, 1.0, 1.0, -1.0]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [1.0] * 5


def test_the_transformer_ignores_padding() -> None:
    torch.manual_seed(0)
    layer = models.SelfAttention(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[False, False, False, True, True]] * 2)
    changed = x.clone()
    changed[:, 3:] += 1
    torch.testing.assert_close(layer(x, padding)[:, :3], layer(changed, padding)[:, :3], rtol=0, atol=1e-14)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"depth: expected one of 8, 20, 50, 152, got 19"):
        ResNet(19)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"widths: expected at least an input and an output size, got \[3\]"):
        models.MLP((3,))
    with pytest.raises(ValueError, match="depth: expected at least 1 hidden layer, got 0"):
        models.TanhNet(0, 4)
    with pytest.raises(ValueError, match=r"activation: expected one of gelu, .*, tanh, got 'rleu'"):
        models.MLP((3, 2, 1), activation="rleu")  # type: ignore[arg-type]


def test_orthogonal_first_weights_keep_signals_alive() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    alive, dead = (models.TanhNet(60, 32, inputs=32, gain=g)(x).std(0).mean() for g in (1.1, None))
    assert alive > 0.1 > 1e-3 > dead
