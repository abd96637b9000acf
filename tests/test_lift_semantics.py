"""What lifting promises about the user's model: it is not touched, comes back as its own class, modes act as on it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from tests.coverage import smooth_loss
from tests.frontend.test_zoo import digest
from tests.frontend.zoo import ZOO

SOLVED = ("normalised", "tied transformer", "functional dropout", "buffers of the model", "auxiliary head", "lstm")


@pytest.mark.parametrize("name", SOLVED)
def test_the_solution_is_the_users_model(name: str) -> None:
    case = ZOO[name]
    torch.manual_seed(0)
    model = case.build()
    before, modes = digest(model), [m.training for m in model.modules()]
    inputs = case.inputs(6)
    lifted = lc.lift(model, inputs, split=3)
    target = torch.zeros(6, 1)
    solution = lifted.solve((inputs, target), loss=smooth_loss, options=lc.RunOptions(steps=2))
    assert digest(model) == before
    assert type(solution.model) is type(model)
    assert list(solution.model.state_dict()) == list(model.state_dict())
    assert [m.training for m in solution.model.modules()] == modes
    ties = [n for n, _ in model.named_parameters()]
    assert [n for n, _ in solution.model.named_parameters()] == ties
    assert any(not torch.equal(a, b) for a, b in zip(solution.model.parameters(), model.parameters(), strict=True))
    model.load_state_dict(solution.model.state_dict())  # into the user's own, without a word
    assert all(torch.equal(a, b) for a, b in zip(solution.model.parameters(), model.parameters(), strict=True))


class Masked(nn.Module):
    """Dropout as a function, so that its mask is made inside a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 30), nn.Linear(30, 30), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.dropout(torch.tanh(self.a(x)), 0.5, self.training)
        return self.c(nn.functional.dropout(torch.tanh(self.b(h)), 0.5, self.training))


def test_masks_are_those_of_the_model_and_fresh_each_time() -> None:
    torch.manual_seed(0)
    model = Masked()
    x = torch.randn(5, 6)
    lifted = lc.lift(model, (x,), split=3).train()
    torch.manual_seed(4)
    first, second = lifted(x), lifted(x)
    torch.manual_seed(4)
    assert torch.equal(first, model(x))
    assert torch.equal(second, model(x))
    assert not torch.equal(first, second)
    lifted.eval()
    assert torch.equal(lifted(x), lifted(x))
    assert torch.equal(lifted(x), copy.deepcopy(model).eval()(x))
    assert lifted.verify(x, torch.zeros(5, 3), loss=nn.functional.mse_loss).ok  # in train mode, too: the same masks


def test_modes_of_a_part() -> None:
    """A part of the lifted copy in another mode than the rest: what its layers do is decided by their own mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Dropout(0.5))
    x = torch.randn(5, 6)
    lifted = lc.lift(model, (x,), split=2)
    for one in (model, lifted.module):
        assert isinstance(one, nn.Sequential)
        one.train()
        one[1].eval()
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(lifted(x), expected)
    assert int(lifted.module.state_dict()["1.num_batches_tracked"]) == 0


def test_what_follows_from_a_buffer_follows_when_it_changes() -> None:
    torch.manual_seed(0)
    model = ZOO["functions of buffers"].build()
    x = torch.randn(5, 6)
    lifted = lc.lift(model, (x,), split=2)
    changed = {n: v + 0.3 for n, v in model.state_dict().items()}
    model.load_state_dict(changed)
    lifted.module.load_state_dict(changed)
    assert torch.equal(lifted(x), model(x))
