"""ProxProp's identities (Frerix et al. 2018) in float64: explicit == SGD, exact == Woodbury == CG, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.proximal import ConjugateGradients, Exact, ProxProp, ProxPropExecutor, design, solve
from lagcompile.workbench.data import digits
from lagcompile.workbench.models import DigitsConvNet

CUT = {"policy": "at", "after": ["0", "4"]}
PLAIN = lc.SGD(lr=1.0)
EXAMPLES = 20


def net() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 7)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(7, 5)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(EXAMPLES, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.arange(EXAMPLES) % 5


def executor(method: ProxProp, model: nn.Module | None = None, split: Any = CUT) -> ProxPropExecutor:
    formulation = lc.Formulation(
        storage=lc.Transient(), multiplier=None, weight=lc.ConstantWeight(value=1.0), domain=lc.Free()
    )
    lifted = lc.lift(model or net(), data()[0][:4], split=split, formulation=formulation)
    return method.executor(lifted.bind(data(), loss=F.cross_entropy))


def moved(method: ProxProp, steps: int = 1, split: Any = CUT) -> dict[str, Tensor]:
    runs = executor(method, split=split)
    for _ in range(steps):
        runs.step(torch.arange(EXAMPLES))
    state: dict[str, Tensor] = runs.instance.recover(net()).state_dict()
    return state


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("split", [CUT, {"policy": "at", "after": ["2", "5"]}])
def test_every_step_explicit_is_plain_sgd(split: Any) -> None:
    model, (x, y) = net(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    close(moved(ProxProp(explicit=("*",), tau=0.05, weights=PLAIN), 3, split), model.state_dict())


@pytest.mark.parametrize("split", [CUT, {"policy": "at", "after": ["2", "5"]}])
def test_exact_is_woodbury_is_conjugate_gradients_to_the_end(split: Any) -> None:
    def method(how: Exact | ConjugateGradients) -> ProxProp:
        return ProxProp(tau=0.5, weights=PLAIN, implicit=how)

    exact = moved(method(Exact(woodbury=False)), 2, split)
    close(moved(method(Exact(woodbury=True)), 2, split), exact)
    close(moved(method(Exact()), 2, split), exact)
    close(moved(method(ConjugateGradients(iterations=40)), 2, split), exact)


def test_the_implicit_step_minimises_the_proximal_problem() -> None:
    """The new weights of a linear and a convolutional layer have no gradient left in their own problem."""
    tau, (x, y) = 0.3, data()
    before, after = net(), net()
    after.load_state_dict(moved(ProxProp(tau=tau, weights=PLAIN, implicit=Exact())))
    z1 = before[0](x)
    z2 = before[4](before[3](before[2](before[1](z1))))
    loss = F.cross_entropy(before[6](before[5](z2)), y)
    d1, d2 = torch.autograd.grad(loss, [z1, z2])
    a2 = before[3](before[2](before[1](z1))).detach()
    for index, a, target in ((0, x, (z1 - d1).detach()), (4, a2, (z2 - d2).detach())):
        layer, old = after[index], before[index]
        value = 0.5 * (layer(a) - target).square().sum()
        for new, was in zip(layer.parameters(), old.parameters(), strict=True):
            value = value + (new - was.detach()).square().sum() / (2 * tau)
        for gradient in torch.autograd.grad(value, list(layer.parameters())):
            assert gradient.abs().max() < 1e-12


def test_the_last_layer_takes_the_gradient_step_and_the_rule_gets_the_direction() -> None:
    model, (x, y) = net(), data()
    loss = F.cross_entropy(model(x), y)
    weight = dict(model.named_parameters())["6.weight"]
    gradient = torch.autograd.grad(loss, weight)[0]
    new = moved(ProxProp(tau=0.2, weights=lc.SGD(lr=0.5)))
    torch.testing.assert_close(new["6.weight"], weight.detach() - 0.1 * gradient, rtol=1e-12, atol=1e-12)


def test_few_iterations_and_many_are_descent_directions() -> None:
    model, (x, y) = net(), data()
    loss = F.cross_entropy(model(x), y)
    gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    for how in (Exact(), ConjugateGradients(iterations=1), ConjugateGradients(iterations=3)):
        new = moved(ProxProp(tau=1.0, weights=PLAIN, implicit=how))
        slope = sum(float(((new[n] - p.detach()) * gradients[n]).sum()) for n, p in model.named_parameters())
        assert slope < 0


@pytest.mark.parametrize("woodbury", [False, True])
def test_a_large_step_size_solves_in_float64_what_float32_cannot(woodbury: bool) -> None:
    torch.manual_seed(0)
    matrix, right = torch.randn(6, 3).repeat(1, 3), torch.randn(6, 2)  # 9 columns of rank 3
    for tau in (1.0, 1e6, 1e9):
        found = solve(matrix, right, tau, Exact(woodbury=woodbury))
        a = matrix.double()
        normal = a.T @ a + torch.eye(9, dtype=torch.float64) / tau
        torch.testing.assert_close(normal @ found.double(), a.T @ right.double(), rtol=1e-4, atol=1e-4)
    assert solve(torch.zeros(6, 9), right, float("inf"), Exact(woodbury=woodbury)).isnan().all()


@pytest.mark.parametrize("how", [Exact(), ConjugateGradients()])
def test_half_precision_models_take_implicit_steps(how: Exact | ConjugateGradients) -> None:
    formulation = lc.Formulation(storage=lc.Transient(), multiplier=None)
    x, y = data()
    lifted = lc.lift(net().bfloat16(), x[:4].bfloat16(), split=CUT, formulation=formulation)
    method = ProxProp(weights=lc.Adam(lr=0.01), implicit=how)
    runs = method.executor(lifted.bind((x.bfloat16(), y), loss=F.cross_entropy))
    runs.step(torch.arange(EXAMPLES))
    moved = runs.instance.recover(net().bfloat16()).state_dict()
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in moved.values())


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # one zero more on one side, on purpose
@pytest.mark.parametrize("padding", [0, (1, 2), "same", "valid"])
def test_the_design_of_a_convolution_gives_its_output(padding: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, (2, 3), padding=padding, dilation=(3, 1)).double()
    a = torch.randn(4, 2, 9, 8, dtype=torch.float64)
    output = layer(a)
    rows, right = design(layer, a, output)
    weights = torch.cat([layer.weight.flatten(1), layer.bias.unsqueeze(1)], dim=1)  # type: ignore[union-attr]
    torch.testing.assert_close(rows @ weights.T, right, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- what it refuses
def test_two_layers_in_a_stage_are_refused_by_path() -> None:
    with pytest.raises(
        lc.ProgramError, match=r"stage f0 holds the layers 0, 4 .*cut after each of them, or name all but"
    ):
        executor(ProxProp(), split={"policy": "at", "after": ["4"]})
    executor(ProxProp(explicit=("0",)), split={"policy": "at", "after": ["4"]}).step(torch.arange(EXAMPLES))


def test_a_layer_that_is_not_affine_is_refused_by_path() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)).double()
    with pytest.raises(
        lc.ProgramError, match=r"the layer 2 \(BatchNorm1d\) has no implicit step.*name it under 'explicit'"
    ):
        executor(ProxProp(), model, {"policy": "at", "after": ["1", "2"]})


class Twice(nn.Module):
    """One layer called twice, behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(128, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        h = self.first(x.flatten(1)).relu()
        h = self.middle(self.middle(h).relu()).relu()
        out: Tensor = self.last(h)
        return out


@pytest.mark.parametrize("after", [["relu", "relu_2"], ["relu", "relu_1", "relu_2"]])
def test_a_layer_used_twice_is_refused_by_path_unless_it_is_explicit(after: list[str]) -> None:
    torch.manual_seed(0)
    model, split = Twice().double(), {"policy": "at", "after": after}
    said = (
        r"calls the layer middle 2 times.*'explicit'" if len(after) == 2 else r"shared by the stages f1, f2.*'explicit'"
    )
    with pytest.raises(lc.ProgramError, match=said):
        executor(ProxProp(), model, split)
    runs = executor(ProxProp(explicit=("*",), tau=0.1, weights=PLAIN), model, split)
    runs.step(torch.arange(EXAMPLES))
    moved, (x, y) = runs.instance.recover(model).state_dict(), data()
    F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(moved[name], p.detach() - 0.1 * p.grad, rtol=1e-12, atol=1e-12)


def test_two_layers_of_one_weight_are_seen_under_both_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)).double()
    model[3].weight = model[2].weight
    with pytest.raises(lc.ProgramError, match=r"3\.weight is shared by the stages f1, f2.*'explicit'"):
        executor(ProxProp(), model, {"policy": "at", "after": ["1", "2", "3"]})


def test_a_pattern_that_names_no_layer_is_said() -> None:
    with pytest.raises(lc.ProgramError, match=r"no layer is called 'fc\*' \(layers with weights: 0, 4, 6\)"):
        executor(ProxProp(explicit=("fc*", "0")))


def test_tables_and_multipliers_are_refused_with_what_to_write() -> None:
    lifted = lc.lift(net(), data()[0][:4], split=CUT)
    instance = lifted.bind(data(), loss=F.cross_entropy)
    with pytest.raises(lc.ProgramError) as caught:
        ProxProp().executor(instance)
    text = str(caught.value)
    assert "the state h1 (after _0, 0) is kept as table: write 'storage: {kind: transient}'" in text
    assert "has no multipliers, but the program has lambda1: write 'multiplier: null'" in text


def test_it_learns_the_digits() -> None:
    splits = digits()
    torch.manual_seed(0)
    formulation = lc.Formulation(storage=lc.Transient(), multiplier=None, weight=lc.ConstantWeight(value=1.0))
    cut = {"policy": "at", "after": ["conv1", "conv2", "fc1"]}
    lifted = lc.lift(DigitsConvNet(channels=8), splits.train_x[:4], split=cut, formulation=formulation)
    solution = lifted.solve(
        (splits.train_x, splits.train_y),
        loss=F.cross_entropy,
        method=ProxProp(),
        options=lc.RunOptions(steps=150, batch_size=64),
    )
    accuracy = float((solution.model.eval()(splits.test_x).argmax(1) == splits.test_y).float().mean())
    assert accuracy > 0.9
