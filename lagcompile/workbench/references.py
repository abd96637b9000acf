"""Names in a spec to Python objects: short names of the built-in models, data sets and losses, or `module:attribute`.

In: names as a spec gives them. Out: the callables that they name. Invariant: what is not built in is resolved by
`ir.trust` alone, within what the person trusts; every name that does not resolve is reported, with what is near it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, final

from torch import nn
from torch.nn import functional

from lagcompile.ir import trust
from lagcompile.ir.base import SpecError
from lagcompile.ir.schemaerrors import listed, suggestion
from lagcompile.saved import load_model
from lagcompile.workbench import data, models
from lagcompile.workbench.resnet import ResNet

Target: TypeAlias = Callable[..., Any]

MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "digits_convnet": models.DigitsConvNet,
        "exported": load_model,
        "lenet5": models.LeNet5,
        "mlp": models.MLP,
        "mnist_convnet": models.MnistConvNet,
        "mnist_convnet_small": models.MnistConvNetSmall,
        "residual_mlp": models.ResidualMLP,
        "resnet": ResNet,
        "sign_net": models.SignNet,
        "small_transformer": models.SmallTransformer,
        "tanh_net": models.TanhNet,
    }
)
DATA: Mapping[str, Callable[..., data.DataSplits]] = MappingProxyType(
    {
        "cifar10": data.cifar10,
        "digits": data.digits,
        "mnist": data.mnist,
        "regression": data.regression,
        "two_moons": data.two_moons,
    }
)
LOSSES: Mapping[str, Target] = MappingProxyType(
    {
        "binary_cross_entropy_with_logits": functional.binary_cross_entropy_with_logits,
        "cross_entropy": functional.cross_entropy,
        "huber": functional.huber_loss,
        "l1": functional.l1_loss,
        "mse": functional.mse_loss,
        "nll": functional.nll_loss,
    }
)


@final
@dataclass(frozen=True)
class Wanted:
    """One name to resolve.

    Attributes:
        name: a short name, or `package.module:attribute`.
        known: the short names that may be used here.
        place: what a problem begins with, e.g. `specs/x.yaml:3: model.name`.
        options: keyword arguments that the callable is to take; names it does not take are problems too.
    """

    name: str
    known: Mapping[str, Target]
    place: str
    options: Mapping[str, object] | None = None


def resolve(name: str, known: Mapping[str, Target], *, place: str) -> Target:
    """Return the callable of one name.

    Raises:
        SpecError: the name does not resolve.
    """
    return resolve_all([Wanted(name, known, place)])[0]


def resolve_all(wanted: Sequence[Wanted]) -> list[Target]:
    """Return the callables of several names, in their order.

    Raises:
        SpecError: a problem for each name that does not resolve and each option that a callable does not take.
    """
    found: list[Target] = []
    problems: list[str] = []
    for entry in wanted:
        try:
            target = _find(entry)
        except SpecError as error:
            problems += error.problems
            continue
        found.append(target)
        problems += [f"{entry.place}: {problem}" for problem in option_problems(target, entry.name, entry.options)]
    if problems:
        raise SpecError(problems)
    return found


def option_problems(target: Target, name: str, options: Mapping[str, object] | None) -> list[str]:
    """List what is wrong with keyword arguments for a callable: unknown names, and required ones that are missing.

    Args:
        target: the callable.
        name: what the user calls it.
        options: the keyword arguments; None checks nothing.
    """
    if options is None:
        return []
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []  # a C callable without a signature: the call itself will fail
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes = [p.name for p in named]
    problems = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for option in sorted(set(options) - set(takes)):
            guess = suggestion(option, takes)
            end = f"{guess} It takes" if guess else "; it takes"
            problems.append(f"'{name}' has no option '{option}'{end}: {listed(takes) or 'none'}")
    missing = [p.name for p in named if p.default is p.empty and p.name not in options]
    if missing:
        problems.append(f"'{name}' needs the option{'s' if len(missing) > 1 else ''} {listed(missing)}")
    return problems


def paths_of(target: Target) -> list[str]:
    """Arguments of a callable that are annotated as paths."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if "Path" in str(p.annotation)]


def _find(wanted: Wanted) -> Target:
    name, known = wanted.name, wanted.known
    if name in known:
        return known[name]
    if ":" not in name and known:
        guess = suggestion(name, known)
        end = f"{guess} Known names" if guess else "; known names"
        raise _problem(wanted, f"unknown name '{name}'{end}: {listed(known)}; your own is written package.module:name")
    built_in = {f"{t.__module__}:{t.__qualname__}": t for t in known.values()}
    if name in built_in:
        return built_in[name]
    try:
        return trust.resolve(name)
    except trust.Refused as error:
        raise _problem(wanted, str(error)) from error


def _problem(wanted: Wanted, message: str) -> SpecError:
    return SpecError(f"{wanted.place}: {message}")
