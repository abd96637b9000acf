"""The systems of the tables: for each, a run spec with its starting values, and what may be searched.

Starting values are published ones where they train at a batch size of 64, otherwise values that did well on the digits'
or MNIST's validation split; they are the first trial of every search, so that all systems begin from a sensible place.

In: a data set's `Bench` (network, splits). Out: `System`s, each of which gives a `RunSpec`. Invariant: systems differ
in split, formulation and method alone; network, data, steps, batch size, weight decay and seeds are the bench's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from lagcompile.backends.method import Solver
from lagcompile.frontend.lower import Formulation
from lagcompile.workbench.benches import Bench, Where, named
from lagcompile.workbench.methods import MethodSpec
from lagcompile.workbench.search import Choice, Draw, Space, Span
from lagcompile.workbench.spec import RunSpec


@dataclass(frozen=True)
class System:
    """One row of a table."""

    name: str
    title: str
    where: Where
    formulation: Mapping[str, Any]
    method: Mapping[str, Any]
    space: Space

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Groups whose step sizes follow a cosine, in every system alike: weights, and states that are kept."""
        method: Solver = TypeAdapter(MethodSpec).validate_python(dict(self.method))
        storage = Formulation.model_validate(dict(self.formulation)).storage
        return ("weights", "states") if method.tables and storage.kept else ("weights",)

    @property
    def start(self) -> Draw:
        """The system's own values of what is searched."""
        whole = {"formulation": self.formulation, "method": self.method}
        return {key: _at(whole, key) for key in self.space}

    def start_on(self, bench: Bench) -> Draw:
        """The first trial on a bench: the system's own values, none above a ceiling."""
        space = self.space_on(bench)
        highest = {
            key: entry.high for key, entry in space.items() if isinstance(entry, Span) and entry != self.space[key]
        }
        return {key: min(value, highest[key]) if key in highest else value for key, value in self.start.items()}

    def space_on(self, bench: Bench) -> Space:
        """What may be searched on a bench."""
        return {
            key: entry.model_copy(update={"high": min(entry.high, bench.ceilings[key])})
            if isinstance(entry, Span) and entry.low < bench.ceilings.get(key, 0.0)
            else entry
            for key, entry in self.space.items()
        }

    def spec(self, bench: Bench, draw: Draw, *, steps: int, seed: int) -> RunSpec:
        """Run spec of one draw."""
        entry: dict[str, Any] = {
            "lagcompile": 1,
            "name": f"{bench.name}-{self.name}",
            "note": self.title,
            "model": dict(bench.model),
            "data": dict(bench.data),
            "split": {"policy": "at", "after": list(bench.splits[self.where])},
            "formulation": copy.deepcopy(dict(self.formulation)),
            "method": copy.deepcopy(dict(self.method)),
            "schedule": {group: {"kind": "cosine"} for group in self.scheduled},
            "run": {"steps": steps, "batch_size": bench.batch_size, "seed": seed},
        }
        for key, value in draw.items():
            _set(entry, key, value)
        if bench.decay:
            weights = entry["method"]["weights"]
            share = float(f"{bench.decay / weights['lr']:.4g}")
            entry["method"]["weights"] = {**weights, "weight_decay": share}
        return RunSpec.model_validate(entry)


def _at(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value


def _set(tree: dict[str, Any], key: str, value: object) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree[part]
    tree[last] = value


def _rule(kind: str, lr: float, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "lr": lr, **more}


_ADAM = _rule("adam", 1e-3)
_WEIGHTS = Span(low=3e-4, high=1e-2)
_STATES = Span(low=5e-3, high=0.3)
_DUALS = Span(low=1e-6, high=1e-2)
_RHO = Span(low=1e-2, high=10.0)
_MARGIN = Span(low=0.005, high=1.0)
_POSITIVE = {"kind": "nonnegative", "by": "relu"}
_PASSING: dict[str, Any] = {
    "storage": {"kind": "transient"},
    "multiplier": None,
    "weight": {"kind": "constant", "value": 1.0},
}


def _saddle(kind: str) -> dict[str, Any]:
    """Saddle-point method on a table.

    A row is visited 15 times in 6,500 steps of batch 128. Inner steps, which run the stages behind the table alone,
    make up for it, in every system alike that keeps a table.
    """
    return {
        "kind": kind,
        "weights": _rule("adam", 2e-3),
        "states": _rule("adagrad", 0.1),
        "multipliers": _rule("sgd", 0.05),
        "inner_steps": 8,
    }


_SADDLE_SPACE: Space = {
    "method.weights.kind": Choice(options=("adam", "adagrad")),
    "method.weights.lr": _WEIGHTS,
    "method.states.lr": _STATES,
    "method.multipliers.lr": _DUALS,
    "formulation.transform.epsilon": _MARGIN,
}


def _gaussians(shrinkage: str, epsilon: float) -> dict[str, Any]:
    """DistProp's states: its authors' code shrinks z-scores hard, their equation (3) softly.

    They remove the ReLU at the split; after it the validation accuracy is higher.
    """
    return {
        "storage": {"kind": "class_gaussian", "samples": 32, "noise": "fresh"},
        "start": {"kind": "unit_sphere"},
        "transform": {"kind": shrinkage, "epsilon": epsilon},
        "classes": 10,
    }


_DISTPROP = {
    **_saddle("extragradient"),
    "states": _rule("adagrad", 0.05),
    "multipliers": _rule("sgd", 1e-4),
    "inner_steps": 0,
}
_TUBE_SPACE: Space = {**_SADDLE_SPACE, "method.multipliers.lr": Span(low=1e-6, high=0.3)}
_TUBE = {"domain": _POSITIVE, "transform": {"kind": "softshrink", "epsilon": 0.02}}
_LR: Space = {"method.weights.lr": _WEIGHTS}

SYSTEMS: tuple[System, ...] = (
    System("backprop", "Backprop", "last", _PASSING, {"kind": "backprop", "weights": _ADAM}, _LR),
    System(
        "extraprop",
        "ExtraProp (extragradient)",
        "last",
        _TUBE,
        _saddle("extragradient"),
        _TUBE_SPACE,
    ),
    System("distprop", "DistProp", "last", _gaussians("hardshrink", 0.3), _DISTPROP, _SADDLE_SPACE),
    System(
        "distprop_soft",
        "DistProp, soft shrinkage",
        "last",
        _gaussians("softshrink", 0.5),
        _DISTPROP,
        _SADDLE_SPACE,
    ),
    System(
        "extraprop_augmented",
        "ExtraProp, augmented (the tube as an inequality)",
        "last",
        {
            "domain": {"kind": "nonnegative", "by": "project"},
            "transform": {"kind": "softshrink", "epsilon": 0.02},
            "weight": {"kind": "augmented", "value": 0.5},
        },
        {**_saddle("extragradient"), "multipliers": _rule("sgd", 0.2)},
        {
            **_LR,
            "method.states.lr": _STATES,
            "method.multipliers.lr": Span(low=1e-3, high=1.0),
            "formulation.weight.value": _RHO,
            "formulation.transform.epsilon": Span(low=5e-4, high=0.1),
        },
    ),
    System(
        "dual_sweep",
        "Extragradient, exact dual sweep",
        "last",
        {"storage": {"kind": "transient"}},
        {
            "kind": "extragradient",
            "weights": _rule("adam", 2e-3),
            "dual_sweep": True,
        },
        _LR,
    ),
    System("gda", "Gradient descent-ascent", "last", _TUBE, _saddle("descent_ascent"), _TUBE_SPACE),
    System(
        "regularized",
        "Quadratic penalty (Regularized)",
        "last",
        {"domain": _POSITIVE, "multiplier": None, "weight": {"kind": "constant", "value": 1.0}},
        _saddle("descent_ascent"),
        {**_LR, "method.states.lr": _STATES, "formulation.weight.value": _RHO},
    ),
    System(
        "auglag",
        "Augmented Lagrangian (extragradient, rho > 0)",
        "last",
        {"domain": _POSITIVE, "weight": {"kind": "constant", "value": 0.3}},
        _saddle("extragradient"),
        {
            **_LR,
            "method.states.lr": _STATES,
            "method.multipliers.lr": Span(low=1e-4, high=1.0),
            "formulation.weight.value": _RHO,
        },
    ),
    System(
        "local_propagation",
        "Local Propagation",
        "last",
        {
            "domain": {"kind": "nonnegative", "by": "project"},
            "start": {"kind": "zeros"},
            "transform": {"kind": "abs_tube", "epsilon": 1e-2},
            "multiplier": {"layout": "example"},
        },
        {**_saddle("descent_ascent"), "states": _rule("adagrad", 0.1), "multipliers": _rule("sgd", 1e-2)},
        {
            **_LR,
            "method.states.lr": _STATES,
            "method.multipliers.lr": Span(low=1e-4, high=1.0),
            "formulation.transform.epsilon": Span(low=1e-4, high=0.1),
        },
    ),
    System(
        "proxprop",
        "ProxProp (3 CG steps)",
        "ahead",
        _PASSING,
        {
            "kind": "proxprop",
            "tau": 0.05,
            "weights": _rule("sgd", 1.0, momentum=0.9, nesterov=True),
            "implicit": {"kind": "cg", "iterations": 3},
        },
        {"method.tau": Span(low=5e-3, high=1.0), "method.weights.lr": Span(low=0.1, high=2.0)},
    ),
    System(
        "altmin",
        "Online AltMin (AltMin-Adam)",
        "ahead",
        {**_PASSING, "weight": {"kind": "constant", "value": 0.006}, "features": "mean"},
        {
            "kind": "altmin",
            "weights": dict(_ADAM),
            "codes": _rule("sgd", 1.5e-3, momentum=0.9, nesterov=True),
            "code_steps": 3,
        },
        {
            **_LR,
            "formulation.weight.value": Span(low=2e-3, high=0.2),
            "method.codes.lr": Span(low=3e-4, high=1e-1),
        },
    ),
    System(
        "dtp",
        "Difference target propagation",
        "behind",
        _PASSING,
        {"kind": "dtp", "weights": _ADAM, "inverses": _ADAM, "target_step": 0.3, "noise": 0.1},
        {
            # At 4e-3 it does well in the steps of a search and collapses to one class in a full run.
            "method.weights.lr": Span(low=1e-4, high=2e-3),
            "method.target_step": Span(low=0.03, high=3.0),
            "method.noise": Span(low=0.01, high=0.5),
        },
    ),
    System("dfa", "Direct feedback alignment", "behind", _PASSING, {"kind": "dfa", "weights": _ADAM}, _LR),
    System(
        "mac",
        "Auxiliary coordinates (growing penalty)",
        "last",
        {
            "domain": _POSITIVE,
            "multiplier": None,
            "weight": {"kind": "geometric", "start": 0.01, "factor": 2.0, "every": 500, "maximum": 100.0},
        },
        {"kind": "augmented_lagrangian", "weights": _ADAM, "states": _rule("adagrad", 0.05), "state_steps": 2},
        {**_LR, "method.states.lr": _STATES, "formulation.weight.start": Span(low=1e-3, high=1.0)},
    ),
    System(
        "pc_alm",
        "PC-ALM (inner loop, local dual ascent)",
        "behind",
        {**_PASSING, "multiplier": {}},
        {
            "kind": "augmented_lagrangian",
            "weights": _ADAM,
            "states": _rule("sgd", 0.2),
            "rounds": 4,
            "state_steps": 1,
        },
        {**_LR, "method.states.lr": Span(low=0.03, high=1.0), "formulation.weight.value": Span(low=0.1, high=3.0)},
    ),
)


def system_of(name: str) -> System:
    """Return a system by its name.

    Raises:
        SpecError: there is none of that name.
    """
    return named("system", SYSTEMS, name)
