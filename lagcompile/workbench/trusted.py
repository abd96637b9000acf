"""Whom a person trusts: modules named on the command line, and folders remembered in their configuration.

In: `--trust` options, the configuration file. Out: the `Scope` of one spec. Invariant: the configuration is one of the
person's files (XDG_CONFIG_HOME, or ~/.config), closed to others (mode 0600), and is written by `lagcompile trust` only;
a folder is trusted at its place: moved or copied, it is not.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lagcompile.ir.base import DataError, SpecError
from lagcompile.ir.trust import Scope

Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="MODULE",
        help="Let the spec name what this module defines, for this call: a module, or a Python file. May be repeated.",
    ),
]
FILE = Path("lagcompile") / "trusted.json"
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


class _HomelessError(DataError):
    """The system does not know the caller's home."""


def configuration() -> Path:
    """The file that remembers trusted folders.

    Raises:
        DataError: there is no place to keep it.
    """
    given = os.environ.get("XDG_CONFIG_HOME", "")
    # A relative path would lie in whatever folder the command runs in.
    if Path(given).is_absolute():
        return Path(given) / FILE
    try:
        return Path.home() / ".config" / FILE
    except RuntimeError:
        raise _HomelessError("you have no home folder here: set HOME or XDG_CONFIG_HOME to remember trust") from None


def folders() -> tuple[Path, ...]:
    """The trusted folders.

    Raises:
        DataError: the file is damaged, or others than the person could have written it.
    """
    try:
        path = configuration()
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="utf-8") as file:
            held = os.fstat(file.fileno())
            if held.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or held.st_uid not in {os.geteuid(), 0}:
                raise DataError(f"{path} can be written by others: it is ignored; check its content, then chmod 600 it")
            found = json.load(file)["folders"]
    except (FileNotFoundError, NotADirectoryError, PermissionError, _HomelessError):
        return ()  # whoever has no configuration here, as a service or in a container, has trusted nothing
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}): remove it, then trust folders anew") from None
    if not isinstance(found, list) or not all(isinstance(f, str) and Path(f).is_absolute() for f in found):
        raise DataError(f"{path} does not hold a list of folders: remove it, then trust folders anew")
    return tuple(Path(f) for f in found)


def trust(folder: Path) -> Path:
    """Remember a folder; returns its real place.

    Raises:
        DataError: there is no such folder, or others can write to it.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    place = folder.resolve()
    if place.parent == place:
        raise DataError(f"{place} holds everything: trust the folder of a project")
    if place.stat().st_mode & stat.S_IWOTH:
        raise DataError(f"anybody can write to {place}: move the project to a folder of your own, or chmod o-w {place}")
    _write([*dict.fromkeys([*folders(), place])])
    return place


def forget(folder: Path) -> Path:
    """Stop trusting a folder; returns its real place.

    Raises:
        DataError: it was not trusted.
    """
    held, places = folders(), {folder.resolve(), folder.absolute()}
    left = [f for f in held if f not in places]
    if len(left) == len(held):
        raise DataError(f"{folder} is not trusted; `lagcompile trust` lists the folders that are")
    _write(left)
    return folder.resolve()


def _write(places: Sequence[Path]) -> None:
    path = configuration()
    path = path.resolve() if path.is_symlink() else path  # a person may keep their configuration elsewhere
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".trusted-", dir=path.parent)  # opened exclusively, mode 0600
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps({"folders": [str(p) for p in places]}, indent=2) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


def scope_of(spec: Path, named: Sequence[str] = ()) -> Scope:
    """Return what the names in a spec may reach.

    Args:
        spec: the file.
        named: what the person named on the command line: modules, or files and folders that hold one.

    Raises:
        SpecError: one of them is not the name of a module.
    """
    home = spec.resolve().parent
    modules, chosen, problems = [], dict[str, Path](), list[str]()
    for name in named:
        path = Path(name)
        file = path.is_file() and path.suffix == ".py"
        if not file and _NAME.fullmatch(name):
            modules.append(name)
        elif (file or (os.sep in name and path.is_dir())) and _NAME.fullmatch(path.resolve().stem):
            modules.append(path.resolve().stem)
            chosen[path.resolve().stem] = path.resolve().parent
        else:
            problems.append(f"--trust {name}: expected a module such as my_nets, or a Python file or package of yours")
    if problems:
        raise SpecError(problems)
    inside = max((f for f in folders() if home.is_relative_to(f)), key=lambda f: len(f.parts), default=None)
    here = Path.cwd().resolve()
    roots = [*chosen.values(), home, *([inside] if inside else []), here] if modules or inside else []
    return Scope(tuple(modules), False, tuple(dict.fromkeys(roots)), inside, home, chosen)
