"""Wrong options of the public Python functions: refused by name where they are given, never another exception later.

A case gives one option of one public record, or one argument of `lift`, `solve` or `verify`, a value of another type or
of extreme size. What is accepted is used: two steps of a small run end with finite weights or with a status that says
why not.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

import lagcompile as lc
from lagcompile.ir.base import Frozen
from tests.unseen._mutate import VALUES
from tests.unseen.files import Hang, limited

CI, NIGHTLY = 400, 20_000
VALID: Mapping[str, Mapping[str, Any]] = {
    "AtSplit": {"after": ["1"]},
    "BalancedSplit": {"stages": 2},
    "ConditioningSplit": {"stages": 2},
    "MemorySplit": {"budget": 10**6, "examples": 8},
    "EverySplit": {"modules": 1},
    "AbsTube": {"epsilon": 0.1},
    "Softshrink": {"epsilon": 0.1},
    "Hardshrink": {"epsilon": 0.1},
    "NormTube": {"epsilon": 0.1},
    "ConstantWeight": {"value": 1.0},
    "AugmentedWeight": {"value": 1.0},
    "Range": {"low": -1.0, "high": 1.0},
}
"""Options that some records need."""


@cache
def records() -> tuple[type[Frozen], ...]:
    """Every public record that a person fills in."""
    found = [getattr(lc, name) for name in lc.__all__]
    results = {lc.Program, lc.Certificate}
    kinds = [k for k in found if isinstance(k, type) and issubclass(k, Frozen) and k not in results]
    return tuple(k for k in kinds if not getattr(k, "__abstractmethods__", None))


def made(rng: random.Random) -> object:
    """A record with one wild option."""
    kind = rng.choice(records())
    values = dict(VALID.get(kind.__name__, {}))
    fields = list(kind.model_fields) or ["x"]
    values[rng.choice(fields)] = rng.choice(VALUES)
    return kind(**values)


def net() -> torch.nn.Module:
    """Three layers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def used(option: object, rng: random.Random) -> None:
    """Two steps of a run that has the option."""
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    keywords: dict[str, Any] = {"options": lc.RunOptions(steps=2, batch_size=4, look_every=1)}
    split: Any = 2
    formulation = None
    if isinstance(option, lc.RunOptions):
        keywords["options"] = option.model_copy(update={"steps": min(option.steps, 2)})
    elif isinstance(option, lc.Method):
        keywords["method"] = option
    elif isinstance(option, lc.Formulation):
        formulation = option
    elif hasattr(option, "policy"):
        split = option
    elif isinstance(option, (lc.SGD, lc.Adam, lc.Adagrad)):
        keywords["method"] = lc.Extragradient(**{rng.choice(["weights", "states", "multipliers"]): option})
    else:
        return
    lifted = lc.lift(net(), (x,), split, formulation)
    solution = lifted.solve((x, y), loss=torch.nn.functional.cross_entropy, **keywords)
    finite = all(bool(torch.isfinite(v).all()) for v in solution.model.state_dict().values())
    assert finite, f"{option!r}: weights that are not finite, status {solution.status.name}"


def argument(rng: random.Random) -> None:
    """A wild argument of `lift`, `plan`, `verify` or `solve`."""
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    more = [x.long(), x[:0], x * float("nan"), y, [x], (x, x), {"x": x}, object(), print, len, net(), x[:, :2], y[:5]]
    wild = rng.choice([*VALUES, *more])
    loss = torch.nn.functional.cross_entropy
    lifting: dict[str, Any] = {"model": net(), "example_inputs": (x,), "split": 2, "formulation": None, "name": None}
    checking: dict[str, Any] = {
        "inputs": x,
        "target": y,
        "tolerance": 1e-8,
        "kwargs": None,
        "loss": loss,
        "weights": None,
    }
    options = lc.RunOptions(steps=1, batch_size=4)
    solving: dict[str, Any] = {"dataset": (x, y), "method": None, "options": options, "device": "cpu", "loss": loss}
    solving |= {"evaluate": None, "watch": None, "start": None}
    planning: dict[str, Any] = {"examples": 10, "state_slots": 1, "dual_slots": 0, "batch_size": 4}
    chosen = rng.choice([lifting, lifting, checking, solving, planning])
    chosen[rng.choice(list(chosen))] = wild
    lifted = lc.lift(**lifting)
    str(lifted.program)
    if chosen is checking:
        str(lifted.verify(**checking))
    elif chosen is solving:
        str(lifted.solve(**solving))
    elif chosen is planning:
        str(lifted.plan(**planning))


def case(seed: int) -> Mapping[str, int]:
    """One wild option, made and used."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    what = "argument" if rng.random() < 0.3 else "option"
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if what == "argument":
                argument(rng)
            else:
                used(made(rng), rng)
    except lc.LagcompileError:
        return {f"{what} refused": 1}
    except Hang as error:
        raise AssertionError(str(error)) from error
    return {f"{what} taken": 1}


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Neither everything nor nothing is refused."""
    assert tally.get("failed", 0) == 0
    if cases >= 200:
        assert tally.get("option taken", 0) > cases / 50
        assert tally.get("option refused", 0) > cases / 10
