"""The program's verifier: every inconsistency is named, all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lagcompile as lc
from lagcompile.ir.program import (
    DataVariable,
    DefectConstraint,
    Multiplier,
    Objective,
    Program,
    Stage,
    StateVariable,
    TensorType,
    WeightVariable,
)


def parts() -> dict[str, Any]:
    """A consistent two-stage program as keyword arguments."""
    return {
        "data": (DataVariable(name="x", type=TensorType(shape=("B", 3))),),
        "weights": (WeightVariable(name="w", type=TensorType(shape=(3, 3))),),
        "states": (
            StateVariable(
                name="h1",
                breakpoint=1,
                node="relu",
                module="act",
                type=TensorType(shape=("B", 3)),
                storage=lc.Table(),
                start=lc.Forward(),
            ),
        ),
        "stages": (
            Stage(name="f0", reads=("x",), writes=("h1",), weights=("w",)),
            Stage(name="f1", reads=("h1",), writes=("out",)),
        ),
        "constraints": (DefectConstraint(name="c_h1", state="h1", stage="f0", transform=lc.Identity()),),
        "multipliers": (Multiplier(name="lambda1", constraint="c_h1"),),
        "objective": Objective(loss="mse_loss", reads=("out",)),
    }


def problems(**changes: Any) -> tuple[str, ...]:
    with pytest.raises(lc.ProgramError) as caught:
        Program(**(parts() | changes))
    return caught.value.problems


def test_consistent_program_stands() -> None:
    program = Program(**parts())
    assert program.state("h1").node == "relu"
    assert program.stage("f1").reads == ("h1",)
    assert program.stage("f1").flops == 0
    defect = program.defect_of("h1")
    assert defect is not None
    assert program.multiplier_of(defect.name) == Multiplier(name="lambda1", constraint="c_h1")
    with pytest.raises(lc.ProgramError, match=r"the program has no state 'h2' \(it has: h1\)"):
        program.state("h2")


def test_unknown_names_are_all_reported() -> None:
    stages = (
        Stage(name="f0", reads=("z",), writes=("h1",), weights=("v",)),
        Stage(name="f1", reads=("h1",), writes=("out",)),
    )
    assert problems(stages=stages, objective=Objective(loss="l", reads=("nothing",))) == (
        "stage 'f0' reads 'z', which is neither data nor a state",
        "stage 'f0' reads the weight 'v', which the program does not have",
        "the objective reads 'nothing', which nothing writes",
    )


def test_order_of_stages() -> None:
    stages = parts()["stages"]
    assert problems(stages=stages[::-1]) == ("stage 'f1' reads the state 'h1' before any stage writes it",)


def test_a_state_needs_a_stage_and_a_constraint() -> None:
    assert problems(constraints=(), multipliers=()) == ("the state 'h1' has no defect constraint",)
    assert "no stage writes the state 'h1'" in problems(
        stages=(Stage(name="f0", reads=("x",), writes=("out",), weights=("w",)),)
    )


def test_eliminated_states_have_no_constraint() -> None:
    state = parts()["states"][0].model_copy(update={"storage": lc.Eliminated()})
    assert problems(states=(state,)) == ("constraint 'c_h1' is on the state 'h1', which is eliminated",)


def test_a_z_score_needs_a_class_gaussian_and_classes() -> None:
    state = parts()["states"][0].model_copy(update={"storage": lc.ClassGaussian()})
    assert problems(states=(state,)) == (
        "constraint 'c_h1': a defect is a z-score exactly where its state is class_gaussian",
        "the state h1 (act): kept per class, but the number of classes is not given: write 'classes: 10', or "
        "'storage: {kind: table}' for data without classes",
    )


def test_one_number_per_example_needs_one_multiplier_per_example() -> None:
    constraint = parts()["constraints"][0].model_copy(update={"transform": lc.NormTube(epsilon=0.1)})
    assert problems(constraints=(constraint,)) == (
        "constraint 'c_h1': norm_tube gives one number per example, its multiplier must be 'example' or 'scalar'",
    )


@pytest.mark.parametrize(
    ("transform", "layout", "relation", "said"),
    [
        (lc.Softshrink(epsilon=0.1), "example", "==", "lay it out 'full' instead of 'example'"),
        (lc.NormTube(epsilon=0.1), "scalar", "==", "lay it out 'example' instead of 'scalar'"),
        (
            lc.Abs(),
            "full",
            "==",
            "is for identity and tubes (softshrink, hardshrink, abs_tube, norm_tube), not for abs",
        ),
        (lc.Softshrink(epsilon=0.1), "full", "<=", "not for a one-sided inequality"),
        (lc.Softshrink(epsilon=0.1), None, "==", "needs a multiplier; for a pure penalty give kind constant"),
    ],
)
def test_where_there_is_no_augmented_lagrangian(
    transform: lc.Abs, layout: str | None, relation: str, said: str
) -> None:
    weight = lc.AugmentedWeight(value=1.0)
    update = {"transform": transform, "relation": relation, "weight": weight}
    constraint = parts()["constraints"][0].model_copy(update=update)
    multipliers = [m.model_copy(update={"layout": layout}) for m in parts()["multipliers"] if layout is not None]
    (problem,) = problems(constraints=(constraint,), multipliers=tuple(multipliers))
    assert problem.startswith("constraint 'c_h1': a weight of kind augmented")
    assert problem.endswith(said)


def test_names_are_unique() -> None:
    multiplier = parts()["multipliers"][0]
    assert problems(multipliers=(multiplier, multiplier)) == ("the multiplier name 'lambda1' is used twice",)


def test_counts_of_a_type() -> None:
    assert TensorType(shape=("B", 3, 4)).count == 12
    assert TensorType(shape=("B", 3, 4)).features == (3, 4)
    assert TensorType().count is None
    assert str(TensorType(shape=("B", 3))) == "float32[B, 3]"
    assert str(TensorType()) == "float32[?]"


def test_lifting_options_that_name_no_state() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    formulation = lc.Formulation(at={"7": lc.StateFormulation(), "0": lc.StateFormulation(multiplier=None)})
    with pytest.raises(lc.ProgramError) as caught:
        _ = lc.lift(model, torch.randn(4, 3), split=2, formulation=formulation).program
    assert caught.value.problems == ("formulation.at: no state is called '7' (states come after: _0)",)
    formulation = lc.Formulation(inputs={"y": lc.InputFormulation()})
    with pytest.raises(lc.ProgramError, match="the model has no input 'y'"):
        _ = lc.lift(model, torch.randn(4, 3), split=2, formulation=formulation).program
