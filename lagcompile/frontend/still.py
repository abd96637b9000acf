"""Run a model, and leave nothing of the run behind.

In: a module and a mode. Out: a context in which it runs with seeded random numbers. Invariant: afterwards modes,
buffers, Python attributes (counters, caches, hooks), and the random generators of torch, Python and NumPy are what they
were; weights are not written.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lagcompile.frontend.tensors import identical

SEED = 20211006
RUNS = 10_000
_CONTAINERS = (list, set, deque, dict)
_MISSING = object()
_TRACED = "_tensor_constant"
"""torch.fx puts the constants of a trace on the module under such names, and its graph reads them there."""


@contextmanager
def as_it_was(
    module: nn.Module,
    training: bool,
    *,
    also: Sequence[nn.Module] = (),
    slopes: bool = False,
    known: dict[str, Attributes] | None = None,
) -> Iterator[Before]:
    """Run in a mode with seeded generators.

    Args:
        module: the module that runs, or holds the weights of what runs.
        training: the mode.
        also: graphs over the module's parts; their own flags are set, the module's parts keep the mode that the
            module's `train` gives them.
        slopes: with autograd.
        known: attributes as an earlier run met them; those that have changed since are looked at again.
    """
    before = Before(module, known)
    others = _outside(before.modules.values(), also)
    modes = [(m, m.training) for m in (*before.modules.values(), *others)]
    with _generators(_devices(module)), torch.set_grad_enabled(slopes):
        module.train(training)
        for m in others:
            m.training = training
        try:
            yield before
        finally:
            for m, mode in modes:
                if m.training != mode:
                    m.training = mode
            before.put_back()


class Before:
    """State of a model besides its weights, before a run."""

    def __init__(self, module: nn.Module, known: dict[str, Attributes] | None = None) -> None:
        self.modules = dict(module.named_modules())
        self.module, self.held = module, _buffers(self.modules)
        self.buffers = {n: b.detach().clone() for n, b in self.held.items()}
        self.attributes = known if known is not None else {}
        for n in self.attributes.keys() - self.modules.keys():
            del self.attributes[n]
        for n, m in self.modules.items():
            kept = self.attributes.get(n)
            if kept is None or kept.module is not m or not kept.untouched():
                self.attributes[n] = Attributes(m)

    def changed(self) -> list[str]:
        """Python attributes that are others now, as `module.attribute`."""
        return [f"{n}.{a}".lstrip(".") for n, kept in self.attributes.items() for a in kept.changed()]

    def count_on(self) -> None:
        """Move the numbers that a run changed to where many such runs would take them."""
        for kept in self.attributes.values():
            now = vars(kept.module)
            for name, value in kept.held.items():
                if type(value) in {int, float} and type(now.get(name)) is type(value) and now[name] != value:
                    now[name] += RUNS * (now[name] - value)

    def buffers_now(self) -> dict[str, Tensor]:
        """The buffers after a run, which may have put others in their places."""
        untouched = all(kept.untouched() for kept in self.attributes.values())
        return _buffers(self.modules if untouched else dict(self.module.named_modules()))

    def put_back(self) -> None:
        """Undo what a run changed."""
        for kept in self.attributes.values():
            kept.put_back()
        restore_buffers(self.modules, self.held, self.buffers)


def restore_buffers(modules: Mapping[str, nn.Module], held: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Put back the buffers of a model's modules: the same tensors, with the values that they had."""
    with torch.no_grad():
        for name, buffer in held.items():
            path, _, last = name.rpartition(".")
            if modules[path]._buffers.get(last) is not buffer:
                modules[path]._buffers[last] = buffer
            if not identical(buffer, before[name]):
                buffer.copy_(before[name])


def _buffers(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What `named_buffers` gives, without another walk through the modules."""
    found = {f"{p}.{n}" if p else n: b for p, m in modules.items() for n, b in m._buffers.items() if b is not None}
    first = {id(b): n for n, b in reversed(found.items())}
    return {n: b for n, b in found.items() if first[id(b)] == n}


def set_mode(module: nn.Module, graphs: Sequence[nn.Module], training: bool) -> None:
    """Put graphs over a module's parts in a mode; the module's decision for its parts is kept."""
    for m in _outside(module.modules(), graphs):
        m.training = training


def _outside(own: Iterable[nn.Module], graphs: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules of graphs that are not parts of a module."""
    seen, found, left = set(own), [], list(graphs)
    while left:
        m = left.pop()
        if m not in seen:
            seen.add(m)
            found.append(m)
            left += [c for c in m._modules.values() if c is not None]
    return found


@contextmanager
def _generators(devices: Sequence[torch.device]) -> Iterator[None]:
    """Seeded generators; put back afterwards."""
    numpy: Any = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(SEED)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(SEED)
        random.seed(SEED)
        if numpy:
            numpy.random.seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(arrays)


def random_states(module: nn.Module) -> tuple[Any, ...]:
    """The states of all generators that a module may draw from."""
    numpy: Any = sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy else None
    devices = [torch.cuda.get_rng_state(d) for d in _devices(module)]
    torchs = tuple(bytes(s.numpy().tobytes()) for s in (torch.get_rng_state(), *devices))
    return (*torchs, random.getstate(), None if arrays is None else (arrays[1].tobytes(), *arrays[2:]))


def _devices(module: nn.Module) -> list[torch.device]:
    if not torch.cuda.is_initialized():
        return []
    tensors = (*module.parameters(), *module.buffers())
    return list(dict.fromkeys(t.device for t in tensors if t.device.type == "cuda"))


class Attributes:
    """What a module holds besides parameters and buffers: references, and the contents of containers and tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held = dict(vars(module))
        self.held.pop("training", None)
        containers = {n: v for n, v in self.held.items() if isinstance(v, _CONTAINERS)}
        self.contents = {n: _contents(v) if len(v) else [] for n, v in containers.items()}
        self.tensors = {n: v.detach().clone() for n, v in self.held.items() if isinstance(v, Tensor)}
        self.empty = [containers[n] for n, v in self.contents.items() if not v]
        self.filled = [(containers[n], v) for n, v in self.contents.items() if v]

    def untouched(self) -> bool:
        """Whether nothing is another object or holds others: what `changed` and `put_back` would find, but quickly."""
        now = vars(self.module)
        return (
            len(now) == len(self.held) + ("training" in now)
            and all(map(is_, map(now.get, self.held, repeat(_MISSING)), self.held.values()))
            and not any(map(len, self.empty))
            and all(_same(_contents(v), before) for v, before in self.filled)
            and all(identical(self.held[n], v) for n, v in self.tensors.items())
        )

    def changed(self) -> list[str]:
        """Names of the attributes that are other objects, or hold others."""
        if self.untouched():
            return []
        now = {n: v for n, v in vars(self.module).items() if n != "training"}
        both = {**self.held, **now}
        names = [n for n in both if n not in now or n not in self.held or now[n] is not self.held[n]]
        names += [
            n for n, v in self.contents.items() if not n.startswith("_") and not _same(_contents(self.held[n]), v)
        ]
        names += [n for n, v in self.tensors.items() if not identical(self.held[n], v)]
        return list(dict.fromkeys(names))

    def put_back(self) -> None:
        """Undo what a run changed."""
        if self.untouched():
            return
        now = vars(self.module)
        for name in [n for n in now if n not in self.held and n != "training"]:
            if not name.startswith(_TRACED):
                del now[name]
        now.update(self.held)
        for name, before in self.contents.items():
            container: Any = self.held[name]
            if _same(_contents(container), before):
                continue
            container.clear()
            if isinstance(container, dict):
                half = len(before) // 2
                for key, value in zip(before[:half], before[half:], strict=True):
                    container[key] = value
            elif isinstance(container, set):
                container.update(before)
            else:
                container.extend(before)
        with torch.no_grad():
            for name, value in self.tensors.items():
                if not identical(self.held[name], value):
                    self.held[name].copy_(value)


def _contents(container: Any) -> list[Any]:
    """References to all that it holds: of mappings, keys and values."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _same(a: list[Any], b: list[Any]) -> bool:
    """The same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))
