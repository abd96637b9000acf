"""Tensors and sub-modules may have any name that PyTorch allows."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 3)
AWKWARD = ("code", "graph", "_graph", "_code", "meta", "self", "recompile", "print_readable", "class", "in", "lambda")
PLAIN = (
    "add",
    "relu",
    "input",
    "x",
    "output",
    "root",
    "torch",
    "device",
    "getitem",
    "h1",
    "f0",
    "0",
    "a b",
    "forward_",
)


class Named(nn.Module):
    """A part of a given name between three layers."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.kind, self.called = kind, name
        if kind == "module":
            self.add_module(name, nn.Linear(4, 4))
        elif kind == "parameter":
            self.register_parameter(name, nn.Parameter(torch.randn(4)))
        else:
            self.register_buffer(name, torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        part = getattr(self, self.called)
        h = torch.tanh(self.first(x))
        h = part(h) if self.kind == "module" else h * part
        return self.third(torch.tanh(self.second(h))) + (0.0 if self.kind == "module" else part.sum())


class Dicts(nn.Module):
    """Names that are Python's keywords."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({"lambda": nn.Linear(4, 4), "a b": nn.Linear(4, 4), "class": nn.Linear(4, 4)})
        self.rows = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.named = nn.ParameterDict({"in": torch.randn(4), "def": torch.randn(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.named["in"]
        for name in ("lambda", "a b", "class"):
            h = torch.tanh(self.layers[name](h))
        for row in self.rows:
            h = torch.tanh(h @ row)
        return h @ self.named["def"]


def assert_solved(model: nn.Module, split: int) -> lc.Lifted:
    lifted = lc.lift(model, (X[:3],), split=split)
    torch.testing.assert_close(lifted.eval()(X), model.eval()(X))
    names = dict(model.named_parameters())
    assert {w.name for w in lifted.program.weights} == set(names)
    solution = lifted.solve((X, Y), loss=nn.functional.mse_loss, options=lc.RunOptions(steps=8, batch_size=4))
    moved = dict(solution.model.named_parameters())
    assert all(not torch.equal(moved[n], p) for n, p in names.items())
    assert lifted.verify(X, Y, loss=nn.functional.mse_loss).ok
    return lifted


@pytest.mark.parametrize("kind", ["module", "parameter", "buffer"])
@pytest.mark.parametrize("name", AWKWARD + PLAIN)
def test_a_part_of_any_name_is_solved_for(kind: str, name: str) -> None:
    assert_solved(Named(kind, name), 3)


def test_keywords_as_names() -> None:
    lifted = assert_solved(Dicts(), 4)
    assert "layers.lambda.weight" in str(lifted.program)


@pytest.mark.parametrize("name", ["graph", "code", "self", "class"])
def test_stages_of_any_names_can_be_copied_and_pickled(name: str) -> None:
    lifted = lc.lift(Named("module", name).eval(), (X[:3],), split=3)
    for twin in (copy.deepcopy(lifted), pickle.loads(pickle.dumps(lifted))):
        torch.testing.assert_close(twin(X), lifted(X))
        assert twin.program == lifted.program
    assert "def forward(self" in next(iter(lifted.stages.values())).code


@pytest.mark.parametrize("kind", ["module", "parameter", "buffer"])
@pytest.mark.parametrize("name", ["graph", "code", "self", "class"])
def test_programs_with_any_names_can_be_saved(kind: str, name: str, tmp_path: Path) -> None:
    model = Named(kind, name).eval()
    folder = lc.lift(model, (X[:3],), split=3).save(tmp_path / "saved", (X[:3],))
    torch.testing.assert_close(lc.load(folder)(X), model(X))


class Repeated(nn.Module):
    """Equal layers, which run as one batched call, the first of a given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = [name, "second", "third"]
        for n in self.order:
            self.add_module(n, nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for n in self.order:
            x = torch.tanh(getattr(self, n)(x))
        return self.head(x)


@pytest.mark.parametrize("name", AWKWARD)
def test_equal_stages_of_any_names_are_one_call(name: str) -> None:
    model = Repeated(name)
    assert_solved(model, 4)
    exact = lc.lift(model, (X[:3],), split=2).solve((X[:2], Y[:2]), loss=nn.functional.mse_loss, method=lc.SQP())
    assert torch.isfinite(exact.model(X)).all()
