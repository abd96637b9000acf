"""More stages than a model can be cut into: one error, which says the largest number that works."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lagcompile as lc
from lagcompile.workbench.cli import main
from tests.workbench.specs import replaced

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 3)
MANY = 99


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Skips(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(torch.tanh(self.b(h)) + h) + h.sum(1, keepdim=True)


class Tuples(Chain):
    """Between a tuple and its items no state can lie."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, 1)
        h = torch.cat([torch.tanh(second), first], 1)
        low, _ = torch.sort(self.b(h), 1)
        return self.c(low)


class Whole(Chain):
    """Whole numbers that cross are no states."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        index = h.argsort(1)
        h = torch.tanh(self.b(torch.tanh(h)))
        return self.c(h.gather(1, index))


class Sizes(Chain):
    """Sizes and what follows from data alone cross freely."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) + x.abs()
        rows = h.shape[0]
        return self.c(torch.tanh(self.b(h)).view(rows, 4) * x.sum(1, keepdim=True))


MODELS = {m.__name__: m for m in (Chain, Skips, Tuples, Whole, Sizes)}


def places(model: nn.Module) -> int:
    """Places in execution order where floating tensors cross, and nothing else that depends on weights and inputs."""
    traced = fx.symbolic_trace(model)
    values: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Keep(traced).run(X)
    data = {n for n in traced.graph.nodes if n.op == "placeholder"}
    staged: list[fx.Node] = []
    for node in traced.graph.nodes:
        if node.op in {"placeholder", "output"}:
            continue
        own = node.op == "call_module"
        if own or any(i in staged for i in node.all_input_nodes):
            staged.append(node)
        else:
            data.add(node)
    count = 0
    for p in range(len(staged) - 1):
        later = staged[p + 1 :]
        crossing = [values[n] for n in staged[: p + 1] if any(n in m.all_input_nodes for m in later)]
        crossing = [v for v in crossing if not isinstance(v, int | torch.Size)]
        count += bool(crossing) and all(isinstance(v, Tensor) and v.is_floating_point() for v in crossing)
    return count


def attempt(model: nn.Module, x: Tensor | None, stages: int) -> lc.Lifted | int:
    """The lifted model, or the largest number of stages that the refusal says."""
    try:
        return lc.lift(model, None if x is None else (x,), split=stages)
    except lc.SplitError as error:
        return error.most or 0


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_number_works_and_is_the_number_of_places(name: str) -> None:
    model = MODELS[name]()
    expected = places(model) + 1
    with pytest.raises(lc.SplitError) as caught:
        lc.lift(model, (X,), split=MANY)
    assert str(caught.value).startswith(f"split into {MANY} stages: the graph allows at most {expected} (")
    assert caught.value.most == expected
    for stages in range(1, expected + 1):
        assert len(lc.lift(model, (X,), split=stages).stages) == stages
    with pytest.raises(lc.SplitError, match=f"at most {expected} "):
        lc.lift(model, (X,), split=expected + 1)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_same_number_at_bind_and_as_a_mapping(name: str) -> None:
    model = MODELS[name]()
    expected = places(model) + 1
    with pytest.raises(lc.SplitError, match=f"at most {expected} "):
        lc.lift(model, (X,), split={"policy": "balanced", "stages": MANY})
    # without inputs nothing is known of types, so that the number may be another one until data are bound
    late = attempt(model, None, expected + 1)
    if isinstance(late, int):
        assert late <= expected
        return
    with pytest.raises(lc.SplitError, match=f"at most {expected} "):
        late.solve((X, Y), loss=nn.functional.mse_loss)
    with pytest.raises(lc.SplitError, match=f"at most {expected} "):
        late.verify(X, Y, loss=nn.functional.mse_loss)


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_lifted_without_inputs_is_cut_as_asked_for(name: str, stages: int) -> None:
    found = attempt(MODELS[name](), None, stages)
    if isinstance(found, int):
        assert found < stages
        stages, found = found, attempt(MODELS[name](), None, found)
    assert isinstance(found, lc.Lifted)
    assert len(found.stages) == stages


class Frozen(Chain):
    """A trace that torch.fx cannot make right: the graph that could be cut more often is not the model."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if h.shape[0] > 4:
            h = torch.tanh(torch.tanh(torch.tanh(h)))
        return self.c(h)


def test_only_graphs_that_are_the_model_count() -> None:
    """The largest number comes from a graph that can be lifted, or the model is refused."""
    model = Frozen()
    try:
        found = attempt(model, X[:3], MANY)
    except lc.LiftError:
        with pytest.raises(lc.LiftError):
            lc.lift(model, (X[:3],), split=1)
        return
    assert isinstance(found, int)
    assert len(lc.lift(model, (X[:3],), split=found).stages) == found


def test_weights_outside_the_model_are_named() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [nn.Linear(4, 4), nn.Linear(4, 4)]
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = torch.tanh(part(x))
            return self.head(x)

    with pytest.raises(lc.SplitError, match=r"at most 1 .*parts\[0\]\.weight.*no parameters of the model.*ModuleList"):
        lc.lift(Listed(), (X[:3],), split=2)


def test_the_command_line_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replaced(tmp_path, "{policy: at, after: [layers.2, layers.4]}", "{policy: balanced, stages: 99}")
    said = []
    for command in ("plan", "show", "solve"):
        monkeypatch.setattr(sys, "argv", ["lagcompile", command, str(spec)])
        with pytest.raises(SystemExit):
            main()
        captured = capsys.readouterr()
        found = re.search(r"split into 99 stages: the\s+graph allows at most (\d+) ", captured.out + captured.err)
        assert found is not None, captured
        said.append(int(found[1]))
    assert len(set(said)) == 1


def test_a_number_that_is_too_large_is_found_out_with_one_export(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    export = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(lc.SplitError) as error:
        lc.lift(model, (torch.randn(5, 4),), split=9)
    assert error.value.most == 3
    assert len(made) == 1
