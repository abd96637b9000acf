"""What a captured model is, whichever front end made the graph.

In: nothing. Out: the records `Capture` and `FrontEnd`, and what both front ends need: ties, source lines, reasons.
Invariant: running `Capture.module` is running the model, up to what the receipt says.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import fx, nn

from lagcompile.frontend.signature import Signature
from lagcompile.frontend.structure import Reference, fill
from lagcompile.ir.base import BindError, Frozen, LagcompileError

FrontEnd = Literal["torch.fx", "torch.export", "make_fx"]


class Sizes(Frozen):
    """Batch sizes that a graph was captured for: from `least` to `most`, in steps; all of them by default."""

    least: int = 1
    most: int | None = None
    step: int = 1
    shapes: tuple[tuple[int | None, ...], ...] = ()
    """Sizes of each input's axes that the graph relies on; None where any will do, or the batch size."""
    why: str = ""
    """What in the model depends on the size."""

    def allow(self, size: int) -> bool:
        """Whether the graph holds for a batch size."""
        inside = size >= self.least and (self.most is None or size <= self.most)
        return inside and (size - self.least) % self.step == 0

    def near(self, size: int, most: int) -> int:
        """The allowed size next below a number, else next above it, up to `most`; the number itself where none is."""
        top = size if self.most is None else min(size, self.most)
        below = top - (top - self.least) % self.step
        found = (n for n in (below, self.least) if 1 <= n <= max(size, most) and self.allow(n))
        return next(found, size)

    def portion(self, count: int, most: int) -> int:
        """The largest allowed size, up to `most`, in which so many rows can be taken one after the other."""
        sizes = range(min(most, count), 0, -1)
        return next((n for n in sizes if self.allow(n) and self.allow(count % n or n)), self.near(sizes[0], count))

    def check(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        """Refuse inputs that the graph was not captured for.

        Raises:
            BindError: each input that does not fit.
        """
        problems = [
            f"the input '{name}' has the shape {tuple(t.shape)}, the model was captured for "
            f"({', '.join('B' if d is None else str(d) for d in shape)}): lift it again with such an example"
            for name, t, shape in zip(names, tensors, self.shapes, strict=False)
            if len(shape) != t.dim() or any(d not in (None, n) for d, n in zip(shape, t.shape, strict=False))
        ]
        if self != Sizes(shapes=self.shapes):
            size = batch_of(tensors)
            if size is not None and not self.allow(size):
                problems.append(
                    f"the model was captured for {self}; this batch has {size}: give batches of such a size, lift it "
                    "again with an example of this size, or keep what depends on the size in a separate sub-module"
                )
        if problems:
            raise BindError(problems)

    def with_(self, other: Sizes) -> Sizes:
        """The sizes that both allow."""
        both = [s for s in (self, other) if s != Sizes(shapes=s.shapes)]
        shapes = self.shapes or other.shapes
        if len(both) < 2:
            return (both or [self])[0].model_copy(update={"shapes": shapes})
        first, second = both
        step = math.lcm(first.step, second.step)
        least = max(first.least, second.least)
        found = [n for n in range(least, least + step) if first.allow(n) and second.allow(n)]
        tops = [s.most for s in both if s.most is not None]
        why = "; ".join(dict.fromkeys(s.why for s in both))
        most = min(tops) if found and tops else None if found else 0
        return Sizes(least=found[0] if found else least, most=most, step=step, shapes=shapes, why=why)

    def __str__(self) -> str:
        if self.most == self.least:
            said = f"batches of {self.least} only"
        else:
            upto = "or more" if self.most is None else f"to {self.most}"
            step = "" if self.step == 1 else f" in steps of {self.step}"
            said = f"batches of {self.least} {upto}{step}"
        return f"{said} ({self.why})" if self.why else said


def batch_of(tensors: Sequence[torch.Tensor]) -> int | None:
    """Common size of the first axis; None where the inputs have none."""
    sizes = {t.shape[0] for t in tensors if t.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


@dataclass(frozen=True)
class ModeOutput:
    """Templates of an output that train and eval mode build differently (auxiliary heads in train mode, for one)."""

    train: Any
    evaluation: Any


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        module: graph module whose placeholders are `signature.names` and which returns a flat tuple; it owns the
            private copy's parameters.
        original: the private copy itself, an instance of the model's class that shares those parameters.
        signature: how the model is called.
        output: template of the model's output, with a `Reference` to a node in the place of each value; a `ModeOutput`
            where the modes return different structures.
        front_end: what made the graph.
        whole: modules kept as one node, with the reason.
        ties: canonical name of a tied parameter -> its other names.
        notes: what else the user should know about the capture.
        sizes: the inputs' sizes that the graph holds for.
    """

    module: fx.GraphModule
    original: nn.Module
    signature: Signature
    output: Any
    front_end: FrontEnd
    whole: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)

    def assemble(self, values: Mapping[str, Any]) -> Any:
        """The model's output, as the user's forward returns it, from values by node name."""
        template = self.output
        if isinstance(template, ModeOutput):
            template = template.train if self.original.training else template.evaluation
        return fill(template, lambda v: values[v.name] if isinstance(v, Reference) else v)

    def assemble_flat(self, flat: Sequence[Any]) -> Any:
        """The model's output from what `module` returns."""
        output = next(n for n in reversed(self.module.graph.nodes) if n.op == "output")
        return self.assemble(dict(zip((n.name for n in output.args[0]), flat, strict=True)))


def ties_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Canonical name -> other names, for parameters that a model holds under several names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {n[0]: tuple(n[1:]) for n in names.values() if len(n) > 1}


_LAGCOMPILE = __file__.rsplit("frontend", 1)[0]
_OWN = (torch.__path__[0], *(_LAGCOMPILE + n for n in ("frontend", "ir", "runtime", "check", "backends", "lift.py")))
_CALLED = ("lagcompile/lift.py", "lagcompile\\lift.py")


def is_users(filename: str) -> bool:
    """Whether a source file is neither torch's, nor this compiler's, nor generated."""
    typed = filename.startswith(("<stdin>", "<console>", "<ipython-input"))
    return not filename.startswith(_OWN) and (typed or not filename.startswith("<"))


def user_line(depth: int = 2) -> str:
    """Return file:line of the user's code that is running, '' where there is none."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and not frame.f_code.co_filename.endswith(_CALLED):  # behind it stands who called lift
        if is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def reason_of(error: BaseException) -> str:
    """Summarise an error in one line, with the innermost line of user code."""
    if isinstance(error, LagcompileError):
        return str(error)
    text = str(error).strip().splitlines()
    first = text[0].split(". ")[0] if text else type(error).__name__
    for entry in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(entry.filename):
            return f"{first} ({entry.filename}:{entry.lineno}: {entry.line})"
    return first
