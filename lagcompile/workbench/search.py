"""Hyper-parameter search on a validation split: random or tree-structured Parzen, with a fixed number of trials.

In: a space of dotted spec keys, a function from a draw to a score. Out: the trials. Invariant: a trial depends on
(space, seed, its number, the scores before it) alone; trials that were made before are not run again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from lagcompile.ir.base import Frozen, Measured, MissingExtraError

Value: TypeAlias = float | int | str | bool
Draw: TypeAlias = dict[str, Value]


class Span(Frozen):
    """A real number between two bounds."""

    kind: Literal["span"] = "span"
    low: float
    high: float
    log: bool = True
    """Whether it is drawn evenly in the logarithm."""


class Choice(Frozen):
    """One of some values."""

    kind: Literal["choice"] = "choice"
    options: tuple[Value, ...] = Field(min_length=1)


Space: TypeAlias = Mapping[str, Annotated[Span | Choice, Field(discriminator="kind")]]


class Trial(Measured):
    """One draw with its score (higher is better; minus infinity where the run diverged)."""

    draw: dict[str, Value]
    score: float
    note: str = ""


def drawn(space: Space, generator: random.Random) -> Draw:
    """Draw a random point of a space."""
    result: Draw = {}
    for name, entry in space.items():
        if isinstance(entry, Choice):
            result[name] = generator.choice(entry.options)
        elif entry.log:
            result[name] = float(f"{math.exp(generator.uniform(math.log(entry.low), math.log(entry.high))):.4g}")
        else:
            result[name] = float(f"{generator.uniform(entry.low, entry.high):.4g}")
    return result


def search(
    space: Space,
    score: Callable[[Draw], tuple[float, str]],
    *,
    trials: int,
    before: Sequence[Trial] = (),
    keep: Callable[[Trial], None] = lambda trial: None,
    seed: int = 0,
    start: Draw | None = None,
    sampler: Literal["random", "tpe"] = "random",
) -> list[Trial]:
    """Run trials until there are `trials` of them.

    Args:
        space: what is searched.
        score: draw -> (score, a note); the score is taken on validation data.
        trials: total number, those before included.
        before: trials that were made before.
        keep: called with each new trial.
        seed: of the draws.
        start: the first trial; None draws it too.
        sampler: random, or Optuna's TPE.

    Raises:
        MissingExtraError: `tpe` without Optuna.
    """
    done = list(before)
    while len(done) < trials:
        number = len(done)
        if number == 0 and start is not None:
            draw = dict(start)
        elif sampler == "tpe":
            draw = _proposed(space, done, seed + number)
        else:
            draw = drawn(space, random.Random(f"{seed}/{number}"))
        value, note = score(draw)
        done.append(Trial(draw=draw, score=value, note=note))
        keep(done[-1])
    return done


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the highest score, the earliest among equals."""
    return max(trials, key=lambda t: t.score)


def _proposed(space: Space, done: Sequence[Trial], seed: int) -> Draw:
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("the tpe sampler needs Optuna: pip install 'lagcompile[bench]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    scales = {
        name: optuna.distributions.CategoricalDistribution(entry.options)
        if isinstance(entry, Choice)
        else optuna.distributions.FloatDistribution(entry.low, entry.high, log=entry.log)
        for name, entry in space.items()
    }
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for trial in done:
        if math.isfinite(trial.score):
            study.add_trial(optuna.trial.create_trial(params=trial.draw, distributions=scales, value=trial.score))
    asked = study.ask(scales)
    return dict(asked.params)
