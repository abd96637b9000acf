"""Printed programs: golden texts, round trips, differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lagcompile as lc
from lagcompile.ir.text import diff, from_json, from_yaml, to_json, to_text, to_yaml
from tests.nets import Residual

GOLDEN = """\
program Residual
  data
    x     float32[B, 6]
    gt    bool[B, 1]
    size  int64[]
  weights (255 trainable in 6 tensors)
    first.weight   float32[12, 6]   f0
    first.bias     float32[12]      f0
    second.weight  float32[12, 12]  f1 f2  shared by stages; also third.weight
    second.bias    float32[12]      f1
    third.bias     float32[12]      f2
    last.weight    float32[3, 12]   f2     frozen
    last.bias      float32[3]       f2
  states
    h1  float32[N, 12]  table  in [-1, 1]  start forward, after tanh
    h2  float32[N, 12]  table  in [-1, 1]  start zeros, after add
  stages
    f0(x) -> h1
    f1(h1) -> h2
    f2(h2, gt, size, h1) -> last
  minimise
    mean over examples of loss(last, target)
    + 0.001 /2 |weights|_2^2
  subject to
    c_h1:  softshrink(f0(x) - h1, 0.1) == 0    multiplier lambda1 (full, start zero), rho 0.5 x2 every 10, at most 100
    c_h2:  relu(||f1(h1) - h2||_1 - 0.2) == 0  multiplier lambda2 (example, start zero)
"""


def residual() -> lc.Program:
    formulation = lc.Formulation(
        domain=lc.OfActivation(),
        transform=lc.Softshrink(epsilon=0.1),
        weight=lc.GeometricWeight(start=0.5, factor=2, every=10, maximum=100),
        at={
            "add": lc.StateFormulation(
                domain=lc.Range(lower=-1, upper=1),
                start=lc.Zeros(),
                transform=lc.NormTube(epsilon=0.2),
                multiplier=lc.MultiplierOptions(layout="example"),
            )
        },
        frozen=("last.w*",),
        regularisers=(lc.Regulariser(kind="l2", on="weights", weight=1e-3),),
    )
    split = {"policy": "at", "after": ["tanh", "add"]}
    return lc.lift(Residual(), torch.randn(4, 6), split=split, formulation=formulation).program


def test_golden_text() -> None:
    assert to_text(residual()) == GOLDEN


def test_round_trips() -> None:
    program = residual()
    assert from_json(to_json(program)) == program
    assert from_yaml(to_yaml(program)) == program
    assert lc.Program.model_validate(program.model_dump()) == program


def test_wrong_yaml_names_the_line() -> None:
    text = to_yaml(residual()).replace("loss: loss", "losss: loss")
    line = 1 + text.splitlines().index(next(t for t in text.splitlines() if "losss" in t))
    with pytest.raises(lc.SpecError, match=rf"program.yaml:{line}: objective.losss: unknown key"):
        from_yaml(text)


def test_diff_shows_what_changed() -> None:
    program = residual()
    other = program.model_copy(update={"name": "other"})
    assert diff(to_text(program), to_text(program)) == ""
    assert "-program Residual\n+program other\n" in diff(to_text(program), to_text(other))


@given(depth=st.integers(1, 5), stages=st.integers(1, 5), table=st.booleans(), penalty=st.booleans())
def test_json_round_trip_of_any_program(depth: int, stages: int, table: bool, penalty: bool) -> None:
    layers = [m for _ in range(depth) for m in (torch.nn.Linear(3, 3), torch.nn.ReLU())]
    formulation = lc.Formulation(
        storage=lc.Table() if table else lc.Transient(),
        multiplier=None if penalty else lc.MultiplierOptions(),
        weight=lc.ConstantWeight(value=1.0) if penalty else None,
    )
    lifted = lc.lift(torch.nn.Sequential(*layers), torch.randn(2, 3), split=min(depth, stages), formulation=formulation)
    assert len(lifted.program.stages) == min(depth, stages)
    assert from_json(to_json(lifted.program)) == lifted.program
    again = lc.lift(torch.nn.Sequential(*layers), torch.randn(2, 3), split=min(depth, stages), formulation=formulation)
    assert to_text(again.program) == to_text(lifted.program)


def test_an_augmented_weight_is_said_and_stored() -> None:
    formulation = lc.Formulation(transform=lc.Softshrink(epsilon=0.05), weight=lc.AugmentedWeight(value=2.0))
    layers = torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)
    program = lc.lift(torch.nn.Sequential(*layers), torch.randn(2, 3), split=2, formulation=formulation).program
    line = next(line for line in to_text(program).splitlines() if "c_h1" in line)
    assert "softshrink(f0(input_1) - h1, 0.05) == 0" in line
    assert line.endswith("multiplier lambda1 (full, start zero), rho 2 on the excess")
    assert from_json(to_json(program)) == program


def test_regularisers_are_said() -> None:
    terms = (lc.Regulariser(kind="l1", on="states", weight=0.5), lc.Regulariser(kind="l2", on="weights", weight=2))
    program = lc.lift(torch.nn.Linear(3, 2), torch.randn(2, 3), formulation=lc.Formulation(regularisers=terms)).program
    assert "    + 0.5 |states|_1\n    + 2 /2 |weights|_2^2\n" in to_text(program)
