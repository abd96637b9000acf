"""From names of code in files (`module:attribute`) to Python objects, where the person who runs them trusts them.

In: a name, and the `Scope` that a person gave. Out: the object, or a `Refused` that says why and what would allow it.
Invariant: no file grants itself anything. What is not trusted is not imported and not looked for; what is reached must
come from a trusted package itself; the standard library, and whatever of torch reads files, is never reached.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, final

from lagcompile.ir.alone import ALONE
from lagcompile.ir.schemaerrors import listed, suggestion

# Letters that look alike must not pass for a module that a person knows.
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_ATTRIBUTE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch": ("torch.nn", "torch.functional", "torch._C._nn", "torch._C._special", "torch._C._linalg"),
        "numpy": (),
    }
)
"""Packages that hold networks and loaders of pickles alike -> the parts that a name may come from."""
_FILES = frozenset({"from_file"})
_STANDARD = sys.stdlib_module_names | {"test"}


class Refused(Exception):  # noqa: N818
    """A name must not run anything; the message says why."""


@final
@dataclass(frozen=True)
class Scope:
    """What the names of one file may reach.

    Attributes:
        modules: modules that the person named, dotted.
        loaded: names come from a Python program, and reach what that program has imported.
        roots: folders in which modules are searched for after all installed ones.
        inside: the trusted folder that holds the file, in which modules of `roots` that were not named must really lie;
            None where the person trusts no such folder.
        home: the folder of the file, for advice.
    """

    modules: tuple[str, ...] = ()
    loaded: bool = False
    roots: tuple[Path, ...] = ()
    inside: Path | None = None
    home: Path | None = None
    chosen: Mapping[str, Path] = field(default_factory=dict)
    """Module -> the folder that holds it, where the person named a file."""

    def allows(self, module: str) -> bool:
        """Whether a module may be imported (or was, by the program itself)."""
        if self.loaded:
            return module in sys.modules
        named = any(module == m or module.startswith(m + ".") for m in self.modules)
        return named or self._holds(module.partition(".")[0])

    def allows_package(self, package: str) -> bool:
        """Whether something that comes from a top-level package may be used."""
        return self.loaded or package in {m.partition(".")[0] for m in self.modules} or self._holds(package)

    def _holds(self, package: str) -> bool:
        """Whether the trusted folder covers a package: its own, one that is nowhere, or torch (its layers, no more)."""
        if self.inside is None or package == "torch":
            return self.inside is not None
        places = _places(_found(package))
        return (bool(places) or package not in sys.modules) and all(
            p.parent in self.roots or p.resolve().is_relative_to(self.inside) for p in places
        )

    @property
    def advice(self) -> str:
        """Say how a person would allow a module, with {} for its name."""
        if self.loaded:
            return "names reach the modules that your program has imported: import {} first"
        if self.inside is not None:
            return "a trusted folder covers its own modules; --trust {} allows this one for this call"
        folder = f", or `lagcompile trust {shlex.quote(str(self.home))}` for that folder" if self.home else ""
        return f"it runs only if you trust it: --trust {{}} for this call{folder}"


PROGRAM = Scope(loaded=True)
NOTHING = Scope()
_SCOPE: ContextVar[Scope] = ContextVar("lagcompile_trust", default=PROGRAM)


@contextmanager
def trusting(scope: Scope) -> Iterator[None]:
    """Resolve names within a scope, whose modules are importable while the context lasts."""
    token = _SCOPE.set(scope)
    try:
        with _importable(tuple(dict.fromkeys(str(r) for r in scope.roots))):
            yield
    finally:
        _SCOPE.reset(token)


_ASIDE: dict[tuple[str, ...], dict[str, ModuleType]] = {}


@contextmanager
def _importable(roots: tuple[str, ...]) -> Iterator[None]:
    """Append folders to the import path, so that nothing in them comes before what is installed.

    The path belongs to the process: one thread at a time changes it. Modules of equal name in other folders are set
    aside meanwhile, so that each file gets its own.
    """
    if not roots:
        yield
        return
    with ALONE:
        added = [root for root in roots if root not in sys.path]
        for key, modules in _ASIDE.items():
            if key != roots:
                modules.update({n: m for n in list(modules) if (m := sys.modules.pop(n, None)) is not None})
        sys.modules.update(_ASIDE.setdefault(roots, {}))
        before = set(sys.modules)
        sys.path.extend(added)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            _ASIDE[roots].update(_own(set(sys.modules) - before, roots))
            for root in added:
                if root in sys.path:
                    sys.path.remove(root)


def _own(names: set[str], roots: Sequence[str]) -> dict[str, ModuleType]:
    """Those of some loaded modules that came from one of the folders."""
    folders = {Path(root) for root in roots}
    tops = {n for n in names if "." not in n and any(p.parent in folders for p in _places(sys.modules[n].__spec__))}
    return {n: sys.modules[n] for n in names if n.partition(".")[0] in tops}


def _places(spec: ModuleSpec | None) -> list[Path]:
    """Return where a module is: its file, or its folders."""
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(p) for p in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin else []


def _found(name: str) -> ModuleSpec | None:
    """Where a module is, or would be loaded from; nothing of a top-level name is imported."""
    return sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)


def resolve(name: str, scope: Scope | None = None) -> Callable[..., Any]:
    """Return the callable that `module:attribute` names.

    Args:
        name: the name as the file gives it.
        scope: what is trusted; None for what the context says: a program's own modules, or a command's scope.

    Raises:
        Refused: it is not trusted, does not exist, or comes from elsewhere than it says.
    """
    scope = _SCOPE.get() if scope is None else scope
    module_name, colon, path = name.partition(":")
    if not colon or not _MODULE.fullmatch(module_name) or not _ATTRIBUTE.fullmatch(path):
        # A terminal obeys control characters, and letters that look alike would hide the reason.
        shown = f"'{name}'" if name.isprintable() and name.isascii() else ascii(name)
        raise Refused(f"{shown} is not of the form package.module:name")
    parts = [*module_name.split("."), *path.split(".")]
    if any(p.startswith("__") for p in parts) and not (scope.loaded and module_name == "__main__" and "__" not in path):
        raise Refused(f"'{name}' reaches into Python itself: names that begin with __ are never followed")
    top = parts[0]
    _check_package(name, top)
    if not scope.allows(module_name):
        raise Refused(f"'{name}' is not built in; {scope.advice.format(top)}")
    module = _module(module_name, scope)
    value = _attribute(name, module, path, scope)
    if not callable(value):
        raise Refused(f"'{name}' is a {type(value).__name__}, expected a class or a function")
    _check_origin(name, value, scope)
    return value


def _check_package(name: str, top: str) -> None:
    if top in _STANDARD:
        raise Refused(
            f"'{name}': '{top}' is part of Python's standard library, which a file may never name, whatever is "
            "trusted; a module of your own needs another name"
        )


def _check_origin(name: str, value: object, scope: Scope) -> None:
    """Whether an object comes from where the person trusts what runs."""
    origin = origin_of(value)
    top = origin.partition(".")[0]
    where = f"'{name}' comes from {origin or 'nowhere known'}"
    if top in _STANDARD or not top:
        raise Refused(f"{where}, which no trust covers: write a function of your own that does what you need")
    if not scope.allows_package(top):
        raise Refused(f"{where}; {scope.advice.format(top)}")
    if top in _PARTS and not isinstance(value, ModuleType) and not _harmless(value, origin, top):
        raise Refused(
            f"{where}: of {top} a file names {'layers, losses and operations only' if _PARTS[top] else 'nothing'}"
        )


def origin_of(value: object) -> str:
    """Return the dotted name of the module that made an object; '' where it has none."""
    if isinstance(value, functools.partial):
        return origin_of(value.func)
    if inspect.ismethod(value):
        return origin_of(value.__func__)
    if isinstance(value, ModuleType):
        return value.__name__
    for holder in (value, getattr(value, "__self__", None), getattr(value, "__objclass__", None)):
        found = getattr(holder, "__module__", None) if holder is not None else None
        if isinstance(found, str):
            return found
    owner = getattr(value, "__self__", None)
    return owner.__name__ if isinstance(owner, ModuleType) else str(type(value).__module__)


def _harmless(value: object, origin: str, top: str) -> bool:
    if any(origin == part or origin.startswith(part + ".") for part in _PARTS[top]):
        return True
    name = getattr(value, "__name__", "")
    operations = getattr(getattr(sys.modules.get("torch"), "_C", None), "_VariableFunctions", None)
    return top == "torch" and name not in _FILES and getattr(operations, name, None) is value


def _module(name: str, scope: Scope) -> ModuleType:
    """A module that is trusted: loaded already, installed, or in one of the scope's folders."""
    if scope.loaded:
        return sys.modules[name]
    parts = name.split(".")
    _check_choice(parts[0], scope)
    for count in range(1, len(parts) + 1):
        part, parent = ".".join(parts[:count]), sys.modules.get(".".join(parts[: count - 1]))
        if part not in sys.modules and not _exists(part, parent):
            raise Refused(f"there is no module '{part}'{_near_module(parts[count - 1], parent)}")
        if count == 1:
            _check_place(part, scope)
        try:
            module = importlib.import_module(part)
        # A user's module may raise anything at all, and SystemExit from a script without a main guard.
        except (Exception, SystemExit) as error:
            raise Refused(f"importing '{part}' failed: {_cause(error)}") from error
    return module


def _check_choice(top: str, scope: Scope) -> None:
    """Refuse a named file whose module's name means an installed package."""
    folder = scope.chosen.get(top)
    places = _places(_found(top))
    if folder is not None and places and all(p.resolve().parent != folder for p in places):
        raise Refused(f"'{top}' of {folder} has the name of an installed package ({places[0]}): give it another name")


def _check_place(top: str, scope: Scope) -> None:
    """Refuse a module that nobody named and that lies, or links to a place, outside the trusted folder."""
    if top in {m.partition(".")[0] for m in scope.modules}:
        return
    for place in _places(_found(top)):
        if place.parent in scope.roots and not (scope.inside and place.resolve().is_relative_to(scope.inside)):
            raise Refused(f"'{top}' is {place.resolve()}, outside the trusted folder {scope.inside}")


def _exists(name: str, parent: ModuleType | None) -> bool:
    return (parent is None or _is_package(parent)) and _found(name) is not None


def _is_package(module: ModuleType) -> bool:
    return module.__spec__ is not None and module.__spec__.submodule_search_locations is not None


def _near_module(name: str, parent: ModuleType | None) -> str:
    if parent is not None and not _is_package(parent):
        return f": '{parent.__name__}' is a module, not a package"
    folders = None if parent is None or parent.__spec__ is None else parent.__spec__.submodule_search_locations
    names = [found.name for found in pkgutil.iter_modules(None if folders is None else list(folders))]
    guess = suggestion(name, names)
    return guess or (" on the import path, beside the file, or where you are" if parent is None else "")


def _attribute(name: str, module: ModuleType, path: str, scope: Scope) -> object:
    value: object = module
    for part in path.split("."):
        if value is not module:
            _check_origin(name, value, scope)
        try:
            value = getattr(value, part)
        except AttributeError:
            public = [n for n, item in vars(module).items() if callable(item) and not n.startswith("_")]
            guess = suggestion(part, public) or f"; it has: {listed(public) or 'nothing callable'}"
            raise Refused(f"module '{module.__name__}' has no '{path}'{guess}") from None
    return value


def _cause(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}{place}"
