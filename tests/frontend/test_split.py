"""Policies, saved splits, and what is said about cuts that cannot be."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.frontend.memory import bytes_of
from lagcompile.frontend.split import SplitFile, SplitPolicy, split_of
from lagcompile.ir.base import SpecError
from lagcompile.ir.yamlfile import validate
from tests.frontend.zoo import TiedTransformer, Unrolled
from tests.nets import Residual, deep

X = torch.randn(4, 5)


def stages(lifted: lc.Lifted) -> list[str]:
    return [s.signature for s in lifted.program.stages]


def after(lifted: lc.Lifted) -> list[tuple[str, ...]]:
    return [b.after for b in lifted.partition.breakpoints]


# ---------------------------------------------------------------- policies
POLICIES: tuple[SplitPolicy, ...] = (
    lc.AtSplit(after=("1", ("3", "2"))),
    lc.EverySplit(type="Linear", n=2),
    lc.BalancedSplit(stages=3),
    lc.NoSplit(),
    lc.AutoSplit(most=2),
    lc.MemorySplit(budget="1 MiB", examples=10),
    lc.ConditioningSplit(bound=2.0),
    lc.IsomorphicSplit(),
)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: str(p.policy))
def test_a_policy_is_plain_data(policy: SplitPolicy) -> None:
    assert split_of(policy.model_dump(mode="json")) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    model = deep(6)
    lifted = lc.lift(model, (X,), split=policy)
    assert lifted.verify(X, torch.zeros(4, 5), loss=nn.functional.mse_loss).ok


def test_every_counts_modules() -> None:
    assert after(lc.lift(deep(5), (X,), split=lc.EverySplit(type="Linear", n=2))) == [("_3",), ("_7",)]


def test_at_takes_globs_and_source_lines() -> None:
    model = Unrolled()
    x = torch.randn(3, 5, 4)
    lifted = lc.lift(model, (x,), split=lc.AtSplit(after=("cell_[13]",)))
    assert after(lifted) == [("cell_1",), ("cell_3",)]
    residual = Residual()
    source = {n.name: n.source for n in lc.lift(residual, (torch.randn(3, 6),)).graph.staged}["add"]
    line = "tests/nets.py:" + source.rpartition(":")[2]
    by_line = lc.lift(residual, (torch.randn(3, 6),), split=lc.AtSplit(after=(line,)))
    assert after(by_line) == [("tanh", "add")]


def test_memory_is_held() -> None:
    model = deep(8)
    one = lc.lift(model, (X,), split=lc.AtSplit(after=("1",))).plan(1000).bytes
    for count in (1, 3, 5):
        split = lc.MemorySplit(budget=count * one + 10, examples=1000)
        lifted = lc.lift(model, (X,), split=split)
        assert len(lifted.stages) == count + 1
        assert lifted.plan(1000).bytes <= count * one + 10
    flops = [s.flops for s in lifted.program.stages]
    assert max(flops) == 2 * min(flops)
    with pytest.raises(lc.SplitError, match=r"no breakpoint fits 10 B for 1,000 examples \(the narrowest needs 60,000"):
        lc.lift(model, (X,), split=lc.MemorySplit(budget="10 B", examples=1000))
    with pytest.raises(lc.SplitError, match="shapes are not known yet, give example_inputs"):
        lc.lift(model, split=lc.MemorySplit(budget="1 GiB", examples=1000))


def test_sizes_are_read() -> None:
    assert [bytes_of(s) for s in ("12", "1 KiB", "1.5 MiB", "2GB", 7)] == [12, 1024, 3 * 2**19, 2 * 10**9, 7]
    with pytest.raises(SpecError, match="'much' is not a size: write a number of bytes"):
        lc.MemorySplit(budget="much", examples=1)


@pytest.mark.parametrize("factor", [3.0, 0.4])
def test_conditioning_cuts_where_products_grow_or_vanish(factor: float) -> None:
    """Orthogonal layers times a factor: the singular values of k of them are factor^k exactly."""
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(9)))
    for k, layer in enumerate(model):
        assert isinstance(layer, nn.Linear)
        layer.weight.data = factor * torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(k)))[0]
    lifted = lc.lift(model, (X,), split=lc.ConditioningSplit(bound=10.0))
    # the first state is behind layer 0; 3^2 = 9 <= 10 < 27: two layers for each stage
    assert after(lifted) == [("_2",), ("_4",), ("_6",)]
    reasons = [b.reason for b in lifted.partition.breakpoints]
    assert all(r.endswith(f"growth {factor**2:.2g} since the place before") for r in reasons)
    calm = lc.lift(nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))), (X,), split=lc.ConditioningSplit(bound=1e9))
    assert len(calm.stages) == 1
    with pytest.raises(lc.SplitError, match="give example_inputs to lift, the growth is measured on them"):
        lc.lift(model, split=lc.ConditioningSplit())


def test_isomorphic_stages_are_equal() -> None:
    tokens = torch.randint(0, 11, (4, 6))
    lifted = lc.lift(TiedTransformer(), (tokens,), split=lc.IsomorphicSplit())
    first, second = stages(lifted)[1:3]
    assert first == second
    time = lc.lift(Unrolled(), (torch.randn(3, 5, 4),), split=lc.IsomorphicSplit())
    assert len(time.stages) >= 5
    layers = lc.lift(deep(9), (X,), split=lc.IsomorphicSplit())
    assert len(set(stages(layers)[1:-1])) == 1
    assert len(lc.lift(deep(9), (X,), split=lc.IsomorphicSplit(group=3)).stages) == 4
    with pytest.raises(lc.SplitError, match="nothing repeats in a row"):
        lc.lift(Residual(), (torch.randn(3, 6),), split=lc.IsomorphicSplit())


class Branches(nn.Module):
    """Branches that run one after the other, each with a bottleneck, ahead of a wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 16)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 8)) for _ in range(3)
        )
        self.head = nn.Sequential(nn.Linear(8, 200), nn.Tanh(), nn.Linear(200, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        a, b, c = (branch(h) for branch in self.branches)
        return self.head(torch.relu(a + b + c))


def test_balanced_cuts_all_branches_at_their_narrowest() -> None:
    """Three bottlenecks of 2 numbers; in execution order at least 10 cross."""
    lifted = lc.lift(Branches(), (X,), split=4)
    assert after(lifted)[0] == ("branches_0_1", "branches_1_1", "branches_2_1")
    first = lifted.plan(10).breakpoints[0]
    assert first.width == 3 * 2 * 4
    assert first.reason == "after branches_0_1 and branches_1_1 and branches_2_1, balanced, narrowest by max-flow"
    assert min(a.width for a in first.alternatives) > first.width
    assert max(s.flops for s in lifted.program.stages) == lifted.program.stages[2].flops  # the wide layer
    assert lifted.verify(X, torch.zeros(4, 3), loss=nn.functional.mse_loss).ok
    assert lc.lift(Branches(), (X,), split=lifted.split).partition.stage_of == lifted.partition.stage_of


def test_auto_never_fails() -> None:
    assert len(lc.lift(nn.Linear(5, 2), (X,)).stages) == 1
    assert len(lc.lift(nn.ReLU(), (X,)).stages) == 1
    assert len(lc.lift(deep(9), (X,)).stages) == 4


# ---------------------------------------------------------------- saved splits
def test_a_split_is_saved_edited_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "split.yaml"
    model = deep(6)
    lifted = lc.lift(model, (X,), split=3)
    lifted.save_split(path)
    text = path.read_text()
    assert text == 'split:\n  policy: at\n  after: ["3", "7"]\n  before: []\n'
    assert lc.lift(model, (X,), split=path).partition.stage_of == lifted.partition.stage_of
    path.write_text(text.replace('"7"', '"9"'))
    assert after(lc.lift(model, (X,), split=path)) == [("_3",), ("_9",)]


class Named(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def test_a_saved_split_that_no_longer_fits_names_what_went(tmp_path: Path) -> None:
    path = tmp_path / "split.yaml"
    path.write_text("split:\n  policy: at\n  after: [encoder, middle, nothing]\n")
    with pytest.raises(lc.SplitError) as caught:
        lc.lift(Named("encoder_1", "middle", "decoder"), (X,), split=path)
    assert caught.value.problems == (
        "the model has no module and no graph node named 'encoder' that a cut could use: did you mean 'encoder_1' or "
        "'decoder'?",
        "the model has no module and no graph node named 'nothing' that a cut could use: it has encoder_1, middle, "
        "decoder",
    )


# ---------------------------------------------------------------- impossible cuts
def test_a_cut_that_separates_nothing() -> None:
    with pytest.raises(lc.SplitError) as caught:
        lc.lift(deep(3), (X,), split=lc.AtSplit(after=("1", "node:_1", "5")))
    assert caught.value.problems == (
        "the breakpoint after node:_1 separates nothing: no stage would be left on one side of it",
        "the breakpoint after 5 separates nothing: no stage would be left on one side of it",
    )
    with pytest.raises(lc.SplitError, match="the breakpoint before 0 separates nothing"):
        lc.lift(deep(3), (X,), split=lc.AtSplit(before=("0",)))


def test_too_many_stages() -> None:
    with pytest.raises(lc.SplitError) as caught:
        lc.lift(deep(2), (X,), split=9)
    assert caught.value.problems == (
        "split into 9 stages: the graph allows at most 4 (one tensor or more must cross each breakpoint)",
    )


class Rounds(nn.Module):
    """An integer value in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).argmax(1))


def test_an_integer_cannot_be_a_state() -> None:
    with pytest.raises(lc.SplitError) as caught:
        lc.lift(Rounds(), (X,), split=lc.AtSplit(after=("argmax",)))
    (problem,) = caught.value.problems
    assert re.fullmatch(
        r"'argmax' \(.*test_split\.py:\d+\) is int64\[B\] and cannot be a state: only floating-point tensors can\. "
        "Cut elsewhere",
        problem,
    )
    assert after(lc.lift(Rounds(), (X,), split=2)) == [("a",)]


class Torn(nn.Module):
    """A value that is overwritten and read again under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        v = h.view(-1, 6)
        v.mul_(2.0)
        return self.b(torch.tanh(h))


def test_a_cut_between_a_view_and_a_write_through_it() -> None:
    x = torch.randn(4, 6)
    for split in (lc.AtSplit(after=("view",)), lc.AtSplit(after=("mul_",)), 2, 3, 4):
        lifted = lc.lift(Torn(), (x,), split=split)
        assert lifted.verify(x, torch.zeros(4, 3), loss=nn.functional.mse_loss).ok


def test_types_that_are_not_there() -> None:
    with pytest.raises(lc.SplitError, match=r"the model runs 0 modules of that type.*types in the model: Linear, Tanh"):
        lc.lift(deep(2), (X,), split=lc.EverySplit(type="Conv2d"))


def test_a_line_that_made_nothing() -> None:
    source = next(n.source for n in lc.lift(Torn(), (torch.randn(4, 6),)).graph.staged if n.name == "mul_")
    line = int(source.rpartition(":")[2])
    with pytest.raises(lc.SplitError) as caught:
        lc.lift(Torn(), (torch.randn(4, 6),), split=lc.AtSplit(after=("test_split.py:1", "elsewhere.py:3")))
    assert caught.value.problems == (
        f"no operation comes from the line test_split.py:1: near lines: {line - 2}, {line - 1}, {line}",
        "no operation comes from the line elsewhere.py:3: no operation comes from that file",
    )


# ---------------------------------------------------------------- the plan says why
def test_the_plan_explains_each_breakpoint() -> None:
    plan = lc.lift(deep(4), (X,), split=2).plan(10)
    (explained,) = plan.breakpoints
    assert explained.reason == "after _3, balanced"
    assert explained.width == 5 * 4
    assert [a.after for a in explained.alternatives] == ["1", "5"]
    assert all(a.width == 20 and a.largest > explained.largest for a in explained.alternatives)
    assert "after _3, balanced" in str(plan)
    assert "1 (20 B, " in str(plan)


# ---------------------------------------------------------------- the README's table
def test_each_policy_has_its_entry_in_the_readme(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    entries = re.findall(r"^\| `(\w+)` \| `(\{policy: .*?\})` \|", text, re.MULTILINE)
    assert {name for name, _ in entries} == {p.policy for p in POLICIES}
    for name, entry in entries:
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"split: {entry}\n")
        assert validate(path, SplitFile).split.policy == name
