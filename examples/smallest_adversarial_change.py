"""The smallest change of an input that makes a ReLU network change its mind, and a proof that none is smaller."""

import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.backends.mip import MixedInteger


class Change(nn.Module):
    """Passes the input on, so that the loss sees how far it has moved."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.net(x)


def largest_change(output: tuple[Tensor, Tensor], original: Tensor) -> Tensor:
    return (output[0] - original).abs().amax()


def lead(scores: Tensor) -> Tensor:
    """At most zero once the second class has caught up with the first."""
    return scores[:, 0] - scores[:, 1]


def trained() -> nn.Module:
    """A small classifier of two moons."""
    torch.manual_seed(0)
    angle = torch.rand(400, dtype=torch.float64) * torch.pi
    label = torch.arange(400) % 2
    x = torch.stack([angle.cos() + label, angle.sin() * (1 - 2 * label) + 0.5 * label], 1)
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), label).backward()
        optimiser.step()
    return net.requires_grad_(False)


if __name__ == "__main__":
    net = trained()
    original = torch.tensor([[0.0, 1.0]], dtype=torch.float64)  # the top of the first moon
    assert int(net(original).argmax()) == 0
    formulation = lc.Formulation(
        frozen=("*",),
        inputs={"x": lc.InputFormulation(lower=-2.0, upper=3.0)},
        constraints=(lc.ValueConstraint(name="caught_up", reads=("net_4",), function=f"{__name__}:lead"),),
    )
    lifted = lc.lift(Change(net), (original,), 2, formulation)
    solution = lifted.solve((original, original), loss=largest_change, method=MixedInteger())
    changed = solution.details["inputs"]["x"]
    size = float((changed - original).abs().max())
    print(f"{original.tolist()} -> {changed.tolist()}: a change of {size:.6f}")
    print(*solution.details["facts"], sep="\n")
    assert solution.status is lc.Status.SOLVED
    assert abs(float(lead(net(changed)))) < 1e-6  # the change ends exactly on the border
    smaller = original + 0.999 * size * (2 * torch.rand(100_000, 2, dtype=torch.float64) - 1)
    assert bool((lead(net(smaller)) > 0).all())  # and nothing smaller crosses it
