"""Constraints and multipliers after a run: read them, compare them with backprop's adjoints, plot them.

Run: python examples/read_multipliers.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lagcompile as lc

FILE = Path(tempfile.gettempdir()) / "lagcompile_multipliers.png"


def adjoints(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Backprop's d loss_i / d h_i at the breakpoint behind the first Tanh."""
    h = model[:2](x).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model[2:](h), y, reduction="sum")
    return torch.autograd.grad(loss, h)[0]


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 6)
    y = (x.sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
    regular = (lc.Regulariser(kind="l2", on="weights", weight=0.1),)
    formulation = lc.Formulation(weight=lc.ConstantWeight(value=1.0), regularisers=regular)
    lifted = lc.lift(model, (x,), split=lc.AtSplit(after=("1",)), formulation=formulation)
    solution = lifted.solve(
        (x, y),
        loss=nn.functional.cross_entropy,
        method=lc.Extragradient(weights=lc.SGD(lr=0.3), states=lc.SGD(lr=0.3), multipliers=lc.SGD(lr=0.5)),
        options=lc.RunOptions(steps=800, batch_size=128, look_every=100),
    )
    for multiplier in lifted.program.multipliers:
        print(f"{multiplier.name} ({multiplier.layout}) belongs to the constraint {multiplier.constraint}")
    states, duals = solution.states["h1"], solution.multipliers["lambda1"]
    trained = solution.model
    defect = (trained[:2](x) - states).abs().max().item()
    wanted = adjoints(trained, x, y)
    error = ((duals - wanted).norm() / wanted.norm()).item()
    print(f"largest defect {defect:.1e}; multipliers differ from backprop's adjoints by {error:.1e} of their norm")

    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    left.semilogy(*solution.history.pairs("defect"))
    left.set(title="mean |defect|", xlabel="step")
    right.plot(wanted.flatten(), duals.flatten(), ".", markersize=2)
    right.set(title="multipliers", xlabel="backprop's adjoint", ylabel="multiplier")
    figure.savefig(FILE, bbox_inches="tight")
    plt.close(figure)
    print(f"plotted to {FILE.name}")

    assert defect < 2e-3, "every constraint holds"
    assert error < 1e-2, "the multipliers found by ascent are the adjoints"


if __name__ == "__main__":
    main()
