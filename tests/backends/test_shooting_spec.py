"""Specs of multiple-shooting fits: each file holds a known problem, and the program they stand for prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from lagcompile.backends.shooting_spec import ShootingSpec, StartOptions, load
from lagcompile.dynamics.program import rollout_program
from lagcompile.dynamics.systems import examples
from lagcompile.ir.base import SpecError
from lagcompile.ir.program import Program
from lagcompile.ir.solution import Status

FOLDER = Path(__file__).parents[2] / "specs" / "shooting"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_each_spec_holds_the_problem_of_its_name(path: Path) -> None:
    spec = load(path)
    assert spec.system == examples()[spec.system.name]
    assert (spec.name, spec.starts.count, spec.starts.factor) == (path.stem, 100, 5.0)


def test_a_spec_runs() -> None:
    spec = load(FOLDER / "logistic.yaml")
    few = spec.model_copy(update={"starts": StartOptions(count=5)})
    result = few.run()
    assert set(result.statuses) == {Status.SOLVED}
    assert few.recovered(result) == 1.0


def test_a_wrong_key_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text((FOLDER / "lorenz.yaml").read_text() + "method:\n  stage_size: 5\n")
    with pytest.raises(SpecError, match=r"wrong\.yaml:\d+: method\.stage_size"):
        load(file)


def test_the_program_of_a_rollout() -> None:
    example = examples()["pendulum"].model_copy(update={"samples": 10})
    program = rollout_program(example.rollout(), example.data(), 4, name="pendulum")
    text = str(program)
    assert "cell.field.gain" in text
    assert [s.name for s in program.states] == ["h1", "h2"]
    assert [s.signature for s in program.stages] == ["RK4 x 4", "RK4 x 4", "RK4 x 2"]
    assert program.stage("f1").reads == ("h1", "u1")
    assert program.objective.reads == ("y0", "y1", "y2")
    assert Program.model_validate_json(program.model_dump_json()) == program


def test_spec_and_problem_agree_on_the_program() -> None:
    spec = ShootingSpec(name="short", system=examples()["van_der_pol"].model_copy(update={"samples": 20}))
    assert len(spec.program(5).states) == 3
