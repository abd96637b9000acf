"""What a program's functions are made of: kinks, random numbers, and whether they are affine in the variables.

In: stage modules and a loss, run once at a point whose variables require gradients. Out: one `Operation` for each ATen
operation that a variable reaches, with the module path that caused it. Invariant: operations are seen below modules and
functions, so that `nn.ReLU`, `F.relu` and `x.relu()` are the same thing, wherever they occur.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lagcompile.frontend.graphmodule import Runner
from lagcompile.runtime.kinks import KINKS, is_norm_of_sizes


@dataclass(frozen=True)
class Operation:
    """One operation that a variable reaches.

    Attributes:
        name: ATen name without overload, such as "relu".
        place: "stage f1, module net.2", or "the loss".
        reached: for each tensor argument, whether a variable reaches it.
        margin: distance of the nearest argument from a kink; None where there is no kink or it is not known.
    """

    name: str
    place: str
    reached: tuple[bool, ...]
    margin: float | None

    @property
    def kinked(self) -> bool:
        """Whether it has points without a derivative."""
        return self.name in KINKS

    @property
    def random(self) -> bool:
        """Whether it draws random numbers."""
        return self.name in RANDOM

    @property
    def affine(self) -> bool:
        """Whether it is affine in what variables reach, given which arguments they reach."""
        if self.name in LINEAR:
            return True
        reached = [i for i, r in enumerate(self.reached) if r]
        if self.name in FACTORS:
            return sum(i in FACTORS[self.name] for i in reached) <= 1
        return self.name in FIXED and not any(i in FIXED[self.name] for i in reached)


RANDOM = frozenset({"bernoulli", "bernoulli_", "native_dropout", "rand", "rand_like", "randn", "randn_like", "normal"})
_LINEAR_NAMES = """add sub neg sum mean view _unsafe_view reshape t transpose permute unsqueeze squeeze expand slice
    select clone index_select index gather cat stack unbind split split_with_sizes unfold flip roll constant_pad_nd
    reflection_pad1d replication_pad1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d cumsum diagonal
    tril triu repeat detach alias lift_fresh _to_copy rsub as_strided upsample_nearest2d upsample_bilinear2d
    pixel_shuffle movedim narrow"""
LINEAR = frozenset(_LINEAR_NAMES.split())
"""Operations that are affine in all their tensor arguments together."""
FACTORS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mul", "mm", "bmm", "mv", "dot", "convolution"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addcmul"), (1, 2)),
}
"""Operations that are affine when variables reach at most one of these tensor arguments."""
FIXED: dict[str, tuple[int, ...]] = {"div": (1,), "where": (0,), "masked_fill": (1,)}
"""Operations that are affine when variables do not reach these tensor arguments."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.place = ""
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [a for a in pytree.tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        reached = tuple(a.requires_grad for a in flat)
        name = str(func.overloadpacket).removeprefix("aten.")
        if any(reached) or name in RANDOM:
            self.found.append(Operation(name, self.place, reached, self._margin(name, args)))
            if is_norm_of_sizes(name, args):
                self.found.append(Operation("abs", self.place, reached, self._margin("abs", args)))
        return func(*args, **(kwargs or {}))

    def _margin(self, name: str, args: Sequence[Any]) -> float | None:
        if name not in KINKS:
            return None
        found = KINKS[name]([a.detach() if isinstance(a, Tensor) else a for a in args])
        return None if found is None or found.numel() == 0 else float(found.min())


class _Stage(Runner):
    """Run a stage's graph and tell the recorder which module each operation belongs to."""

    def __init__(self, module: fx.GraphModule, label: str, paths: dict[str, str], recorder: _Recorder) -> None:
        super().__init__(module)
        self._label, self._paths, self._recorder = label, paths, recorder

    def run_node(self, n: fx.Node) -> Any:
        path = self._paths.get(n.name, "")
        where = f"module {path}" if path else f"operation {n.name}"
        self._recorder.place = f"stage {self._label}, {where}"
        return super().run_node(n)


class Observer:
    """Collect the operations of stages and of a loss; used as a context around their runs."""

    def __init__(self) -> None:
        self._recorder = _Recorder()

    def run_stage(self, module: fx.GraphModule, label: str, paths: dict[str, str], inputs: Sequence[Any]) -> Any:
        """Run a stage and record its operations.

        Args:
            module: the stage; its trainable parameters must require gradients.
            label: name of the stage.
            paths: node name -> module path in the user's model.
            inputs: values that it reads.
        """
        with torch.enable_grad(), self._recorder:
            return _Stage(module, label, paths, self._recorder).run(*inputs)

    def run_loss(self, loss: Callable[[], Tensor]) -> Tensor:
        """Run a loss and record its operations."""
        self._recorder.place = "the loss"
        with torch.enable_grad(), self._recorder:
            return loss()

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Operations that were seen."""
        return tuple(self._recorder.found)


def kink_problems(operations: Sequence[Operation]) -> Iterator[str]:
    """One sentence for each place with a kink."""
    for place, names in _by_place(o for o in operations if o.kinked):
        yield (
            f"{place}: {', '.join(names)} has points without a derivative, where an SQP method has no multipliers to "
            "offer. What works: a smooth activation (softplus, tanh, gelu); a state with a domain (nonnegative or "
            "range) in the place of the activation; the mixed_integer backend for piecewise-linear networks with "
            "frozen weights; or kinks='accept', which says how far the solution is from the nearest kink"
        )


def random_problems(operations: Sequence[Operation]) -> Iterator[str]:
    """One sentence for each place that draws random numbers in evaluation mode."""
    for place, names in _by_place(o for o in operations if o.random):
        yield f"{place}: {', '.join(names)} draws random numbers in eval mode: an exact program needs fixed functions"


def nearest_kink(operations: Sequence[Operation]) -> str | None:
    """A sentence on the distance from the nearest kink; None without kinks."""
    kinked = [o for o in operations if o.kinked]
    if not kinked:
        return None
    known = [o for o in kinked if o.margin is not None]
    blind = sorted({f"{o.name} in {o.place}" for o in kinked if o.margin is None})
    text = ""
    if known:
        worst = min(known, key=lambda o: o.margin if o.margin is not None else 0.0)
        text = f"the nearest kink ({worst.name} in {worst.place}) is {worst.margin:.1e} away"
        text += (
            ": the KKT conditions hold in the usual sense"
            if (worst.margin or 0.0) > 1e-6
            else (": derivatives there are one-sided and the KKT conditions are not proven")
        )
    if blind:
        text += f"{'; ' if text else ''}the distance from the kinks of {', '.join(blind)} was not measured"
    return text


def _by_place(operations: Iterator[Operation]) -> Iterator[tuple[str, list[str]]]:
    places: dict[str, list[str]] = {}
    for o in operations:
        names = places.setdefault(o.place, [])
        if o.name not in names:
            names.append(o.name)
    yield from places.items()
