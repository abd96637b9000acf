"""Random small networks and random cuts: what was split is the network, exactly."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.frontend.balance import cuts_of
from lagcompile.frontend.graph import build_graph
from lagcompile.frontend.places import names_of
from lagcompile.ir.program import Program
from tests.coverage import smooth_loss
from tests.frontend.test_zoo import digest

WIDTH = 4
UNARY = ("linear", "tanh", "shared", "norm", "dropout", "relu in place", "view", "sizes")


class Random(nn.Module):
    """A directed acyclic graph of operations: (kind, first operand, second operand) for each node."""

    def __init__(self, steps: tuple[tuple[str, int, int], ...], outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.first = nn.Linear(WIDTH, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        kinds = {"linear": lambda: nn.Linear(WIDTH, WIDTH), "norm": lambda: nn.BatchNorm1d(WIDTH)}
        kinds |= {"dropout": lambda: nn.Dropout(0.3)}
        self.layers = nn.ModuleList(kinds.get(k, nn.Identity)() for k, _, _ in steps)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [self.first(x)]
        for layer, (kind, i, j) in zip(self.layers, self.steps, strict=True):
            a, b = values[i % len(values)], values[j % len(values)]
            if kind == "add":
                values.append(a + b)
            elif kind == "multiply":
                values.append(torch.sigmoid(a) * b)
            elif kind == "tanh":
                values.append(torch.tanh(a))
            elif kind == "shared":
                values.append(self.shared(a))
            elif kind == "relu in place":
                values.append((a * 1.5).relu_())
            elif kind == "view":
                values.append(a.view(-1, 2, WIDTH // 2).transpose(1, 2).reshape(-1, WIDTH))
            elif kind == "sizes":
                values.append(a.reshape(b.size(0), -1) / a.shape[1])
            else:
                values.append(layer(a))
        return (values[-1], *(values[k % len(values)] for k in self.outputs))


@st.composite
def networks(draw: st.DrawFn) -> Random:
    step = st.tuples(st.sampled_from((*UNARY, "add", "multiply")), st.integers(0, 20), st.integers(0, 20))
    steps = draw(st.lists(step, min_size=2, max_size=9))
    outputs = draw(st.lists(st.integers(0, 9), max_size=2))
    torch.manual_seed(draw(st.integers(0, 3)))
    return Random(tuple(steps), tuple(outputs))


def random_split(model: Random, data: st.DataObject) -> lc.AtSplit | lc.NoSplit:
    """A few breakpoints, each behind one to three nodes (with all that they depend on)."""
    lifted = lc.lift(model, (torch.randn(4, WIDTH),), split=lc.NoSplit())
    nodes = [n.name for n in lifted.graph.staged if n.floating]
    names = st.lists(st.sampled_from(nodes), min_size=1, max_size=3, unique=True)
    entries = data.draw(st.lists(names.map(tuple), min_size=1, max_size=3))
    chosen: list[tuple[str, ...]] = []
    for entry in entries:
        try:
            spec = lc.AtSplit(after=tuple(tuple(f"node:{n}" for n in e) for e in (*chosen, entry)))
            spec.split(lifted.graph)
        except lc.SplitError:  # it separates nothing: another entry may
            continue
        chosen.append(entry)
    if not chosen:
        return lc.NoSplit()
    return lc.AtSplit(after=tuple(tuple(f"node:{n}" for n in e) for e in chosen))


@settings(max_examples=20, deadline=None)
@given(networks(), st.data())
def test_random_cuts_of_random_networks(model: Random, data: st.DataObject) -> None:
    split = random_split(model, data)
    before = digest(model)
    x = torch.randn(5, WIDTH)
    lifted = lc.lift(model, (x,), split=split)
    assert digest(model) == before
    assert lc.lift(model, (x,), split=split).program == lifted.program
    assert Program.model_validate_json(lifted.program.model_dump_json()) == lifted.program
    for training in (False, True):
        twin, again = copy.deepcopy(model).train(training), copy.deepcopy(lifted).train(training)
        torch.manual_seed(1)
        expected = twin(x)
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(again(x), expected, strict=True))
        assert all(torch.equal(v, again.module.state_dict()[k]) for k, v in twin.state_dict().items())
    certificate = lifted.verify(x, None, loss=smooth_loss)
    assert certificate.verdict != "failed", str(certificate)
    assert all("nothing but zeros" in r for r in certificate.reasons), str(certificate)  # units that are off
    if lifted.partition.stages > 1:
        saved = lc.AtSplit(after=names_of(lifted.partition))
        assert saved.split(lifted.graph).stage_of == lifted.partition.stage_of


@settings(max_examples=20, deadline=None)
@given(networks(), st.integers(2, 4))
def test_balanced_is_the_best_of_all(model: Random, stages: int) -> None:
    """The dynamic program against all choices of places."""
    lifted = lc.lift(model, (torch.randn(4, WIDTH),), split=lc.NoSplit())
    assert lc.AutoSplit().split(lifted.graph).stages <= 4  # never an error
    cuts = cuts_of(lifted.graph)
    places = cuts.preferred if len(cuts.preferred) >= stages - 1 else cuts.allowed
    if len(places) < stages - 1:
        return
    total = int(cuts.work[-1])

    def score(chosen: tuple[int, ...]) -> tuple[int, int]:
        ends = [0, *(int(cuts.work[p]) for p in chosen), total]
        largest = max(b - a for a, b in pairwise(ends))
        return largest, sum(int(cuts.bytes[p]) for p in chosen)

    best = min(score(tuple(int(p) for p in c)) for c in combinations(places, stages - 1))
    found = lc.BalancedSplit(stages=stages).split(lifted.graph)
    largest = max(sum(n.flops for n in found.nodes_of(k)) for k in range(stages))
    width = sum(lifted.graph.by_name[n].bytes for b in found.breakpoints for n in b.crossing)
    assert largest <= best[0]
    assert width <= best[1]  # less where branches make a narrower cut than the execution order has


def test_a_graph_is_made_of_records() -> None:
    torch.manual_seed(0)
    lifted = lc.lift(Random((("linear", 0, 0), ("add", 0, 1)), ()), (torch.randn(2, WIDTH),))
    graph = build_graph(lifted.network.capture, None)
    assert [n.name for n in graph.nodes] == [n.name for n in lifted.graph.nodes]
    assert set(graph.networkx.edges) == {("x", "first"), ("first", "layers_0"), ("first", "add"), ("layers_0", "add")}
