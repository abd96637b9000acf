"""Each spec's program prints the text that was looked at; and each spec's method is defined on its program."""

from __future__ import annotations

import pytest
import torch

import lagcompile as lc
from lagcompile.workbench.spec import load
from tests.golden.programs import GOLDEN, NAMES, SHAPES, SPECS, program


@pytest.mark.parametrize("name", NAMES)
def test_the_program_prints_as_before(name: str) -> None:
    assert str(program(name)) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("mnist")])
def test_the_method_takes_two_steps(name: str) -> None:
    loaded = load(SPECS / f"{name}.yaml")
    spec = loaded.spec
    torch.manual_seed(0)
    model = loaded.model(**dict(spec.model.args))
    x, y = torch.randn(40, *SHAPES[spec.data.name]), torch.arange(40) % 10
    lifted = lc.lift(model, (x[:8],), split=loaded.split, formulation=spec.formulation, name=spec.name)
    assert isinstance(spec.method, lc.Method)
    runs = spec.method.executor(lifted.bind((x, y), loss=loaded.loss), seed=0)
    for _ in range(2):
        runs.step(torch.arange(20))
    measures = runs.measures()
    assert all(torch.isfinite(torch.tensor(v)) for v in measures.values())
    assert set(spec.schedule.given()) <= set(runs.groups())


def test_every_spec_has_its_text() -> None:
    assert {p.stem for p in SPECS.glob("*.yaml")} == set(NAMES) == {p.stem for p in GOLDEN.glob("*.txt")}
