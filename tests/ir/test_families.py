"""Runs of equal things are said once, and read back as they were."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.ir.axes import Forward
from lagcompile.ir.families import FamilyError, fold, unfold
from lagcompile.ir.program import DefectConstraint, Multiplier, Objective, Stage, StateVariable, TensorType
from lagcompile.ir.text import from_json, from_yaml, to_json, to_text, to_yaml
from lagcompile.ir.transforms import Identity

WORDS = st.sampled_from(["h", "f", ".", "_", "-", "0", "1", "07", "9", "10", "{", "{k}", "at", "B", "0.5"])
LEAVES = st.one_of(
    st.lists(WORDS, max_size=4).map("".join), st.integers(-2, 12), st.booleans(), st.none(), st.floats(0, 1)
)
ENTRIES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "at", "k"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(entries=st.lists(ENTRIES, max_size=30), repeats=st.integers(1, 6))
def test_what_is_folded_reads_back(entries: list[Any], repeats: int) -> None:
    items = json.loads(json.dumps(entries * repeats))
    assert unfold(fold(items))[0] == items


@given(
    lines=st.lists(st.tuples(st.sampled_from("hf"), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=5),
    members=st.integers(4, 30),
    lead=st.lists(ENTRIES, max_size=3),
)
def test_a_run_is_one_entry(lines: list[tuple[str, int, int]], members: int, lead: list[Any]) -> None:
    run = [
        {"name": f"{word}{slope * k + start}.{k}", "number": k, "place": i}
        for k in range(members)
        for i, (word, slope, start) in enumerate(lines)
    ]
    items = [*lead, *run]
    folded = fold(items)
    assert unfold(folded)[0] == items
    assert len(folded) <= len(lead) + 1 or len(lead) > 0
    assert sum(len(entry["each"]) for entry in folded if isinstance(entry, dict) and "each" in entry) <= 2 * len(lines)


def test_each_entry_knows_where_it_stands() -> None:
    items: list[Any] = [{"name": "x"}, *({"name": f"h{k}", "stage": k - 1} for k in range(1, 6)), {"name": "y"}]
    folded = fold(items)
    assert folded[1] == {"k": [1, 5], "each": [{"name": "h{k}", "stage": {"at": "k-1"}}]}
    again, origins = unfold(folded)
    assert again == items
    assert origins == [(0,), *[(1, "each", 0)] * 5, (2,)]


@pytest.mark.parametrize(
    "entry",
    [
        {"k": [1, 5]} | {"each": "h{k}"},
        {"k": [5, 1], "each": []},
        {"k": [1, True], "each": [{}]},
        {"k": [1], "each": [{}]},
        {"each": [{}]},
        {"k": [0, 10**9], "each": [{"name": "h{k}"}]},
        {"k": [0, 1], "each": [{"name": "{" + "9" * 40 + "k}"}]},
    ],
)
def test_a_family_that_says_nothing_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(FamilyError, match=r"entry 0|too long"):
        unfold([entry])
    text = to_json(chain(3))
    data = json.loads(text)
    data["states"] = [entry]
    with pytest.raises(lc.ProgramError, match=r"program\.json"):
        from_json(json.dumps(data))


class Layers(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        output: Tensor = self.head(x)
        return output


def chain(stages: int) -> lc.Program:
    """A program as lowering writes it, of any length, without a network."""
    shape = TensorType(shape=("B", 4))
    start = Forward()
    names = [f"h{k}" for k in range(1, stages)]
    states = [
        StateVariable(
            name=f"h{k}",
            breakpoint=k,
            node=f"tanh_{k}",
            module=f"layers.{k - 1}",
            type=shape,
            storage=lc.Table(),
            start=start,
        )
        for k in range(1, stages)
    ]
    reads, writes = ["x", *names], [*names, "head"]
    weights = [f"layers.{k}.{part}" for k in range(stages) for part in ("weight", "bias")]
    return lc.Program(
        data=({"name": "x", "type": shape},),
        weights=tuple({"name": w, "type": TensorType(shape=(4, 4) if "weight" in w else (4,))} for w in weights),
        states=tuple(states),
        stages=tuple(
            Stage(name=f"f{k}", reads=(reads[k],), writes=(writes[k],), weights=tuple(weights[2 * k : 2 * k + 2]))
            for k in range(stages)
        ),
        constraints=tuple(
            DefectConstraint(name=f"c_h{k}", state=f"h{k}", stage=f"f{k - 1}", transform=Identity())
            for k in range(1, stages)
        ),
        multipliers=tuple(Multiplier(name=f"lambda{k}", constraint=f"c_h{k}") for k in range(1, stages)),
        objective=Objective(loss="loss", reads=("head",)),
    )


def test_a_thousand_equal_layers_fit_a_screen() -> None:
    program = chain(1000)
    text = to_text(program)
    assert text.count("\n") <= 30
    assert "    h{k}  float32[N, 4]  table  free  start forward, after tanh_{k}  k = 1 .. 999\n" in text
    assert "    f{k}(h{k}) -> h{k+1}  k = 1 .. 998\n" in text
    assert "    c_h{k}:  f{k-1}(h{k-1}) - h{k} == 0  multiplier lambda{k} (full, start zero)  k = 2 .. 999\n" in text
    stored = to_json(program)
    assert len(stored) < 20_000
    assert from_json(stored) == program
    assert from_yaml(to_yaml(program)) == program


def test_a_lifted_chain_prints_its_layers_once() -> None:
    program = lc.lift(Layers(9), torch.randn(3, 4), split=9).program
    assert "    layers.{k}.0.weight  float32[4, 4]  f{k}    k = 0 .. 8\n" in to_text(program)
    assert from_json(to_json(program)) == program


def test_a_file_of_format_1_is_read() -> None:
    program = chain(6)
    data = program.model_dump(mode="json") | {"format": 1}
    assert from_json(json.dumps(data)) == program
    data["format"] = 3
    with pytest.raises(lc.ProgramError, match=r"program\.json:1: format: expected 2, got 3"):
        from_json(json.dumps(data))


def test_a_wrong_entry_of_a_family_names_the_line_of_its_template() -> None:
    lines = to_json(chain(50)).splitlines()
    number = next(i for i, line in enumerate(lines) if '"h{k}"' in line)
    lines[number] = lines[number].replace('"name"', '"nom"')
    with pytest.raises(lc.ProgramError) as caught:
        from_json("\n".join(lines))
    assert any(p.startswith(f"program.json:{number + 1}: states[0].nom: unknown key") for p in caught.value.problems)
