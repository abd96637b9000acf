"""Your own model in ten lines: lift it, look at the program, check it, solve it.

Run: python examples/own_model.py
"""

import torch
from torch import nn

import lagcompile as lc


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x[:, 0] > x[:, 1]).long()
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))

    rho = lc.Formulation(weight=lc.ConstantWeight(value=1.0))
    lifted = lc.lift(model, (x,), split=3, formulation=rho)
    print(lifted.program)
    print(lifted.plan(examples=len(x)))

    certificate = lifted.verify(x, y, loss=nn.functional.cross_entropy)
    print(certificate)

    method = lc.Extragradient(weights=lc.Adam(lr=1e-2), states=lc.SGD(lr=0.3), multipliers=lc.SGD(lr=0.3))
    solution = lifted.solve(
        (x, y), loss=nn.functional.cross_entropy, method=method, options=lc.RunOptions(steps=200, batch_size=128)
    )
    accuracy = float((solution.model(x).argmax(1) == y).float().mean())
    print(f"{solution}\naccuracy on the training data {accuracy:.3f}")

    assert certificate.ok, "multipliers of the dual sweep must be backprop's adjoints"
    assert type(solution.model) is type(model), "the solution is a module of your own class"
    assert accuracy > 0.95, "the split network must have learned which input is larger"


if __name__ == "__main__":
    main()
