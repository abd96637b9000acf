"""Names in a spec to Python objects: short names of the built-in models, data sets and losses, or `module:attribute`.

In: names as a spec gives them. Out: the callables they stand for. Invariant: only an importable module's attribute can
be reached, nothing is evaluated; every name that does not resolve is reported, with what is near it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeAlias, final

from torch import nn
from torch.nn import functional

from lagcompile.ir.base import SpecError
from lagcompile.ir.schemaerrors import listed, suggestion
from lagcompile.workbench import data, models
from lagcompile.workbench.resnet import ResNet

Target: TypeAlias = Callable[..., Any]

MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "digits_convnet": models.DigitsConvNet,
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

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


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


@contextmanager
def importable_from(folder: str | Path) -> Iterator[None]:
    """Put a folder in front of the import path for as long as the context lasts.

    The modules that were imported stay loaded; the path is as it was before, also after an error.
    """
    entry = str(Path(folder).resolve())
    before = list(sys.path)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def resolve(name: str, known: Mapping[str, Target], *, place: str) -> Target:
    """The callable that one name stands for.

    Raises:
        SpecError: the name does not resolve.
    """
    return resolve_all([Wanted(name, known, place)])[0]


def resolve_all(wanted: Sequence[Wanted]) -> list[Target]:
    """The callables that several names stand for, in their order.

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
    """What is wrong with keyword arguments for a callable: names it does not take, required ones that are missing.

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
        return []  # a callable of C without a signature: the call itself will tell
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


def _find(wanted: Wanted) -> Target:
    name, known = wanted.name, wanted.known
    if name in known:
        return known[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        guess = suggestion(name, known)
        end = f"{guess} Known names" if guess else "; known names"
        raise _problem(wanted, f"unknown name '{name}'{end}: {listed(known)}; your own is written package.module:name")
    if not _NAME.fullmatch(module_name) or not _NAME.fullmatch(attribute):
        raise _problem(wanted, f"'{name}' is not of the form package.module:name")
    target = _attribute(wanted, _module(wanted, module_name), attribute)
    if not callable(target):
        raise _problem(wanted, f"'{name}' is a {type(target).__name__}, expected a class or a function")
    return target


def _module(wanted: Wanted, name: str) -> ModuleType:
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        parent = sys.modules.get(".".join(parts[: count - 1]))
        if part not in sys.modules and not _exists(part, parent):
            raise _problem(wanted, f"there is no module '{part}'{_near_module(parts[count - 1], parent)}")
        try:
            module = importlib.import_module(part)
        # A user's module may raise anything at all, and SystemExit from a script without a main guard.
        except (Exception, SystemExit) as error:
            raise _problem(wanted, f"importing '{part}' failed: {_cause(error)}") from error
    return module


def _exists(name: str, parent: ModuleType | None) -> bool:
    if parent is not None and not _is_package(parent):
        return False
    return importlib.util.find_spec(name) is not None


def _is_package(module: ModuleType) -> bool:
    return module.__spec__ is not None and module.__spec__.submodule_search_locations is not None


def _near_module(name: str, parent: ModuleType | None) -> str:
    if parent is not None and not _is_package(parent):
        return f": '{parent.__name__}' is a module, not a package"
    folders = None if parent is None or parent.__spec__ is None else parent.__spec__.submodule_search_locations
    names = [found.name for found in pkgutil.iter_modules(None if folders is None else list(folders))]
    guess = suggestion(name, names)
    return guess or (" on the import path; run from the folder that holds it" if parent is None else "")


def _attribute(wanted: Wanted, module: ModuleType, path: str) -> object:
    value: object = module
    for part in path.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            public = [name for name, item in vars(module).items() if callable(item) and not name.startswith("_")]
            guess = suggestion(part, public) or f"; it has: {listed(public) or 'nothing callable'}"
            raise _problem(wanted, f"module '{module.__name__}' has no '{path}'{guess}") from None
    return value


def _cause(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}{place}"


def _problem(wanted: Wanted, message: str) -> SpecError:
    return SpecError(f"{wanted.place}: {message}")
