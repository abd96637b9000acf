"""Run a model, and leave nothing of the run behind.

In: a module and a mode. Out: a context in which it runs with seeded random numbers. Invariant: afterwards modes,
buffers, Python attributes (counters, caches, hooks), and the random generators of torch, Python and NumPy are what they
were; weights are not written.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lagcompile.frontend.symbolic import restore_buffers

SEED = 20211006
RUNS = 10_000
_CONTAINERS = (list, set, deque)
_TRACED = "_tensor_constant"
"""torch.fx puts the constants of a trace on the module under such names, and its graph reads them there."""


@contextmanager
def as_it_was(
    module: nn.Module, training: bool, *, also: Sequence[nn.Module] = (), slopes: bool = False
) -> Iterator[Before]:
    """Run in a mode with seeded generators.

    Args:
        module: the module that runs, or holds the weights of what runs.
        training: the mode.
        also: graphs over the module's parts; their own flags are set, the module's parts keep the mode that the
            module's `train` gives them.
        slopes: with autograd.
    """
    modes = [(m, m.training) for root in (module, *also) for m in root.modules()]
    before = Before(module)
    with _generators(_devices(module)), torch.set_grad_enabled(slopes):
        module.train(training)
        set_mode(module, also, training)
        try:
            yield before
        finally:
            for m, mode in modes:
                m.training = mode
            before.put_back()


class Before:
    """What a model held besides its weights ahead of a run."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held = dict(module.named_buffers())
        self.buffers = {n: b.detach().clone() for n, b in self.held.items()}
        self.attributes = {n: _Attributes(m) for n, m in module.named_modules()}

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

    def put_back(self) -> None:
        """Undo what a run changed."""
        for kept in self.attributes.values():
            kept.put_back()
        restore_buffers(self.module, self.held, self.buffers)


def set_mode(module: nn.Module, graphs: Sequence[nn.Module], training: bool) -> None:
    """Put graphs over a module's parts in a mode; what the module itself decided for its parts stands."""
    own = set(module.modules())
    for root in graphs:
        for m in root.modules():
            if m not in own:
                m.training = training


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
    tensors = (*module.parameters(), *module.buffers())
    return list(dict.fromkeys(t.device for t in tensors if t.device.type == "cuda"))


class _Attributes:
    """What a module holds besides parameters and buffers: references, and the contents of containers and tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held = {n: v for n, v in vars(module).items() if n != "training"}
        self.contents = {n: _contents(v) for n, v in self.held.items() if isinstance(v, (*_CONTAINERS, dict))}
        self.tensors = {n: v.detach().clone() for n, v in self.held.items() if isinstance(v, Tensor)}

    def changed(self) -> list[str]:
        """Names of the attributes that are other objects, or hold others."""
        now = {n: v for n, v in vars(self.module).items() if n != "training"}
        both = {**self.held, **now}
        names = [n for n in both if n not in now or n not in self.held or now[n] is not self.held[n]]
        names += [
            n for n, v in self.contents.items() if not n.startswith("_") and not _same(_contents(self.held[n]), v)
        ]
        names += [n for n, v in self.tensors.items() if not torch.equal(self.held[n], v)]
        return list(dict.fromkeys(names))

    def put_back(self) -> None:
        """Undo what a run changed."""
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
            if isinstance(container, list | deque):
                container.extend(before)
            else:
                container.update(before)
        with torch.no_grad():
            for name, value in self.tensors.items():
                if not torch.equal(self.held[name], value):
                    self.held[name].copy_(value)


def _contents(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _same(a: list[Any], b: list[Any]) -> bool:
    """The same objects in the same order."""
    flat = [[x for v in side for x in (v if isinstance(v, tuple) else (v,))] for side in (a, b)]
    return len(flat[0]) == len(flat[1]) and all(x is y for x, y in zip(*flat, strict=True))
