"""Functions that a model holds, and that read the model: hooks and attributes that are closures over it.

In: a module, or a record that holds modules. Out: these functions made anew, to read its copy. Invariant: Python copies
a function as the function itself, so that a copied model would run the weights of the user's model; no function that is
held by a copy does.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

_CONTAINERS = (dict, list, set, deque)
_CLOSED = (str, bytes, int, float, complex, type, Tensor, ModuleType, FunctionType, fx.Graph, fx.Node)
"""What holds nothing to look into, but for functions, which are looked into by themselves."""


class Closures:
    """The functions that a value holds.

    Attributes:
        functions: those that read, by what they close over, something of the value's own.
    """

    def __init__(self, value: Any) -> None:
        held = {id(v): v for v in _within([value], _parts)}
        self._own = {i: v for i, v in held.items() if isinstance(v, (nn.Module, Tensor, *_CONTAINERS))}
        self._all = [v for v in _within(held.values(), _everything) if isinstance(v, FunctionType)]
        self.functions = [f for f in self._all if self._reads(f)]
        self._cells: dict[int, tuple[CellType, CellType]] = {}

    def _reads(self, value: Any) -> bool:
        return any(id(v) in self._own for v in _within([value], _everything))

    def foreign(self) -> Iterator[tuple[str, str]]:
        """Functions and classes of modules that read a module of the value as a global variable, with its name."""
        forwards = {inspect.getattr_static(type(m), "forward") for m in self._own.values() if isinstance(m, nn.Module)}
        for function in dict.fromkeys([*self._all, *(f for f in forwards if isinstance(f, FunctionType))]):
            for name in _globals(function.__code__):
                value = function.__globals__.get(name)
                if isinstance(value, nn.Module | Tensor) and id(value) in self._own:
                    place = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
                    yield f"{function.__qualname__} ({place})", name

    def ahead(self, memo: dict[int, Any]) -> None:
        """Make the functions anew, with nothing in their cells yet, for a deep copy to find."""
        for function in self.functions:
            cells = tuple(
                self._cells.setdefault(id(cell), (cell, CellType()))[1] for cell in function.__closure__ or ()
            )
            made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
            made.__dict__.update(function.__dict__)
            made.__qualname__ = function.__qualname__
            memo[id(function)] = made

    def behind(self, memo: dict[int, Any]) -> None:
        """Fill in what they close over: the copies of the model's own, all else as it is."""
        for cell, made in self._cells.values():
            for content in _content(cell):
                made.cell_contents = self._copied(content, memo)
        for function in self.functions:
            made = memo[id(function)]
            given = function.__defaults__
            made.__defaults__ = None if given is None else tuple(self._copied(v, memo) for v in given)
            named = function.__kwdefaults__
            made.__kwdefaults__ = None if named is None else {n: self._copied(v, memo) for n, v in named.items()}

    def _copied(self, value: Any, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(value, memo) if self._reads(value) else value


def _within(values: Iterable[Any], parts: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """Everything that is reached from some values."""
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting.extend(parts(value))


def _parts(value: Any) -> Iterator[Any]:
    """What a value holds by itself."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield value.__self__
    elif not isinstance(value, _CLOSED) and hasattr(value, "__dict__"):
        yield from vars(value).values()


def _everything(value: Any) -> Iterator[Any]:
    """What a value holds, what functions close over included."""
    yield from _parts(value)
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _content(cell)
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()


def _content(cell: CellType) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # it is not filled yet
        return


def _globals(code: CodeType) -> Iterator[str]:
    """Names that code reads as global variables."""
    yield from (str(i.argval) for i in dis.get_instructions(code) if i.opname in {"LOAD_GLOBAL", "LOAD_NAME"})
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)
