"""A training loop of your own: the executor's step, a torch scheduler, a checkpoint by state_dict.

Run: python examples/own_loop.py
"""

import io

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import lagcompile as lc

STEPS, BATCH = 200, 32


def build() -> tuple[lc.Executor, CosineAnnealingLR, nn.Module, torch.Tensor, torch.Tensor]:
    """The same problem each time: lift, bind, and a method's executor with a schedule on its weights."""
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = torch.tanh(x @ torch.randn(4, 2))
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Dropout(0.05), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))
    formulation = lc.Formulation(weight=lc.ConstantWeight(value=1.0))
    lifted = lc.lift(model, (x,), split=2, formulation=formulation)
    method = lc.Extragradient(weights=lc.Adam(lr=1e-2), states=lc.Adagrad(lr=0.1), multipliers=lc.SGD(lr=0.3))
    executor = method.executor(lifted.bind((x, y), loss=nn.functional.mse_loss), seed=0)
    schedule = CosineAnnealingLR(executor.optimizers["weights"], T_max=STEPS)
    return executor, schedule, model, x, y


def advance(executor: lc.Executor, schedule: CosineAnnealingLR, to: int) -> None:
    """Steps up to `to`; the rows of a step follow from its number, so a run can be taken up anywhere."""
    while executor.steps < to:
        rows = torch.arange(BATCH) + BATCH * (executor.steps % 8)
        executor.step(rows)
        schedule.step()
        if executor.steps % 50 == 0:
            print(executor.steps, {k: round(v, 5) for k, v in executor.measures().items()})


def main() -> None:
    executor, schedule, model, x, y = build()
    advance(executor, schedule, STEPS // 2)
    file = io.BytesIO()
    torch.save({"executor": executor.state_dict(), "schedule": schedule.state_dict()}, file)
    advance(executor, schedule, STEPS)
    trained = executor.instance.recover(model).eval()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, its_schedule, _, _, _ = build()
    again.load_state_dict(saved["executor"])
    its_schedule.load_state_dict(saved["schedule"])
    advance(again, its_schedule, STEPS)
    resumed = again.instance.recover(model).eval()

    loss = nn.functional.mse_loss(trained(x), y).item()
    print(f"loss {loss:.4f}, variance of the targets {y.var().item():.4f}")
    pairs = zip(trained.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "the resumed run is the unbroken one, bit for bit"
    assert loss < 0.1 * y.var().item()


if __name__ == "__main__":
    main()
