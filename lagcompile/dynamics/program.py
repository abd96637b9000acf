"""A rollout over trajectories as a `Program`: a run of equal stages with tied parameters, one state at each breakpoint.

In: a `Rollout`, the number of samples and the stage length. Out: the same IR that `lift` makes of any network, without
unrolling the loop. Invariant: one row of a state's table is one trajectory; every stage has the same signature,
except the last where the stage length does not divide the samples.
"""

from __future__ import annotations

from lagcompile.dynamics.rollout import Rollout
from lagcompile.dynamics.trajectories import Trajectories
from lagcompile.ir.axes import Observed
from lagcompile.ir.domains import Free, Range
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
from lagcompile.ir.storages import Table
from lagcompile.ir.transforms import Identity


def rollout_program(
    rollout: Rollout,
    data: Trajectories,
    length: int,
    *,
    domain: tuple[float | None, float | None] = (None, None),
    name: str = "rollout",
) -> Program:
    """The estimation problem of a rollout as a program.

    Args:
        rollout: the model.
        data: the measurements, for their shapes.
        length: S, samples in a stage.
        domain: bounds on every state component, None for none.
        name: of the program.
    """
    n, count = rollout.state_size, -(-data.samples // length)
    state = TensorType(dtype="float64", shape=("B", n))
    weights = tuple(
        WeightVariable(
            name=key, type=TensorType(dtype="float64", shape=tuple(value.shape)), trainable=value.requires_grad
        )
        for key, value in rollout.named_parameters()
    )
    names = tuple(w.name for w in weights)
    where = Free() if domain == (None, None) else Range(lower=domain[0], upper=domain[1])
    variables, stages, series, constraints, multipliers = [], [], [], [], []
    inputs = 0 if data.inputs is None else int(data.inputs.shape[2])
    for k in range(count):
        samples = min(length, data.samples - k * length)
        reads = ["x0" if k == 0 else f"h{k}"]
        if inputs:
            reads.append(f"u{k}")
            series.append(DataVariable(name=f"u{k}", type=_series(samples, inputs)))
        writes = [f"y{k}"] if k == count - 1 else [f"h{k + 1}", f"y{k}"]
        stages.append(
            Stage(
                name=f"f{k}",
                reads=tuple(reads),
                writes=tuple(writes),
                weights=names,
                modules=("cell", "readout"),
                signature=f"{type(rollout.cell).__name__} x {samples}",
            )
        )
        if k == 0:
            continue
        variables.append(
            StateVariable(
                name=f"h{k}",
                breakpoint=k,
                node=f"sample_{k * length}",
                module="cell",
                type=state,
                storage=Table(),
                domain=where,
                start=Observed(),
            )
        )
        constraints.append(DefectConstraint(name=f"c{k}", state=f"h{k}", stage=f"f{k - 1}", transform=Identity()))
        multipliers.append(Multiplier(name=f"lambda{k}", constraint=f"c{k}"))
    return Program(
        name=name,
        data=(DataVariable(name="x0", type=state, free=True), *series),
        weights=weights,
        states=tuple(variables),
        stages=tuple(stages),
        constraints=tuple(constraints),
        multipliers=tuple(multipliers),
        objective=Objective(loss="half_squared_error", reads=tuple(f"y{k}" for k in range(count)), reduction="sum"),
    )


def _series(samples: int, width: int) -> TensorType:
    return TensorType(dtype="float64", shape=("B", samples, width))
