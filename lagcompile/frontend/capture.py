"""What a captured model is, whichever front end made the graph.

In: nothing. Out: the records `Capture` and `FrontEnd`, and what both front ends need: ties, source lines, reasons.
Invariant: running `Capture.module` is running the model, up to what the receipt says.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from lagcompile.frontend.signature import Signature
from lagcompile.frontend.structure import Reference, fill
from lagcompile.ir.base import LagcompileError

FrontEnd = Literal["torch.fx", "torch.export"]


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
        original: the private copy itself, an instance of the user's class that shares those parameters.
        signature: how the model is called.
        output: template of the model's output, with a `Reference` to a node in the place of each value; a `ModeOutput`
            where the modes return different structures.
        front_end: what made the graph.
        whole: modules kept as one node, with the reason.
        ties: canonical name of a tied parameter -> its other names.
        notes: what else the user should know about the capture.
    """

    module: fx.GraphModule
    original: nn.Module
    signature: Signature
    output: Any
    front_end: FrontEnd
    whole: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
_OWN = (torch.__path__[0], _LAGCOMPILE + "frontend", _LAGCOMPILE + "lift.py")


def is_users(filename: str) -> bool:
    """Whether a source file is neither torch's, nor this compiler's, nor generated."""
    return not filename.startswith(_OWN) and not filename.startswith("<")


def user_line(depth: int = 2) -> str:
    """file:line of the user's code that is running, '' where there is none."""
    frame = sys._getframe(depth)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def reason_of(error: BaseException) -> str:
    """What went wrong and where, in one line: the innermost line of the user's own code."""
    if isinstance(error, LagcompileError):
        return str(error)
    text = str(error).strip().splitlines()
    first = text[0].split(". ")[0] if text else type(error).__name__
    for entry in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(entry.filename):
            return f"{first} ({entry.filename}:{entry.lineno}: {entry.line})"
    return first
