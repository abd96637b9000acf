"""What a certificate is bound to, and which identities a program has, by the program alone.

In: a `Network` and its `Program`. Out: digests by name; identities. Invariant: nothing is run here, and two liftings of
one model give the same digests in every process.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lagcompile.check.certificate import MODES, Identity, Kind, digest
from lagcompile.frontend.stages import Network
from lagcompile.ir.program import DefectConstraint, Program, StateVariable, ValueConstraint

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def bindings(network: Network, program: Program) -> dict[str, str]:
    """Digests of program, stages, weights and buffers, and the model's class."""
    original = network.capture.original
    return {
        "model": type(original).__name__,
        "program": program_digest(program),
        "stages": stages_digest(network),
        "weights": named_digest(dict(original.named_parameters(remove_duplicate=False))),
        "buffers": named_digest(dict(original.named_buffers(remove_duplicate=False))),
    }


def program_digest(program: Program) -> str:
    """Digest of a program without its loss, which a certificate names and which is unknown before data are bound."""
    objective = program.objective.model_copy(update={"loss": ""})
    return digest([program.model_copy(update={"objective": objective}).model_dump_json()])


def named_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of tensors by name."""
    return digest([part for name in sorted(tensors) for part in (name, tensors[name])])


def stages_digest(network: Network) -> str:
    """Digest of what each stage runs: its graph, its layers and their settings, its constants."""
    own = set(dict(network.capture.original.named_buffers()))
    parts: list[str | Tensor] = []
    for stage in (network.prologue, *network.stages):
        parts += [stage.name, str(stage.reads), str(stage.writes), _text(stage.module)]
        constants = {n: b for n, b in stage.module.named_buffers() if n not in own}
        parts += [part for name in sorted(constants) for part in (name, constants[name])]
    return digest(parts)


def _text(module: nn.Module) -> str:
    lines = []
    for name, part in module.named_modules():
        inside = str(part.graph) if isinstance(part, fx.GraphModule) else part.extra_repr()
        lines.append(f"{name} {type(part).__qualname__} {inside}")
        if not isinstance(part, fx.GraphModule) and not type(part).__module__.startswith("torch."):
            lines.append(_code(type(part).forward))
        for kept in (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks):
            lines += [f"{name} hook {_code(hook)}" for hook in kept.values()]
    return _ADDRESS.sub("", "\n".join(lines))


def _code(function: Callable[..., Any]) -> str:
    """What a function of Python does, as far as its own code and the numbers that it holds on to say it."""
    inner = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    own = getattr(inner, "__func__", inner)
    code, cells = getattr(own, "__code__", None), getattr(own, "__closure__", None) or ()
    held = [c.cell_contents for c in cells if isinstance(c.cell_contents, (bool, int, float, str))]
    held += [v for v in (getattr(own, "__defaults__", None) or ()) if isinstance(v, (bool, int, float, str))]
    said = "" if code is None else f"{code.co_code.hex()} {code.co_consts} {code.co_names}"
    return f"{getattr(own, '__qualname__', type(own).__qualname__)} {said} {held}"


def label(state: StateVariable) -> str:
    """A state's name with its place."""
    return f"{state.name} (after {state.module or state.node})"


def network_identities(program: Program) -> Iterator[Identity]:
    """List what holds in each mode where a cut network is the model."""
    per_state: tuple[Kind, ...] = ("defect", "adjoint", "state stationarity")
    for mode in MODES["network"]:
        yield "forward", "output", mode
        for state in program.states:
            for kind in per_state:
                yield kind, label(state), mode
        for weight in program.weights:
            if _moves(weight.type.dtype):
                yield "weight gradient", weight.name, mode


def solution_identities(program: Program) -> Iterator[Identity]:
    """List what holds at a solution of a program: stationarity of each variable, feasibility of each constraint."""
    (mode,) = MODES["solution"]
    weights = [w.name for w in program.weights if w.trainable]
    kept = [s for s in program.states if s.storage.variable]
    others = [*(d.name for d in program.data if d.free), *(s.name for s in kept)]
    for name in weights:
        yield "weight stationarity", name, mode
    for name in others:
        yield "state stationarity", name, mode
    for state in kept:
        if state.domain.bounded:
            yield "primal feasibility", f"bounds of {state.name}", mode
    for c in program.constraints:
        if isinstance(c, DefectConstraint):
            if program.multiplier_of(c.name) is not None:
                yield "primal feasibility", f"{c.name} (sums)" if in_sums(program, c) else c.name, mode
        elif c.weight is None or program.multiplier_of(c.name) is not None:
            for name in _rows_of(c, {*weights, *others}):
                yield "primal feasibility", name, mode


def in_sums(program: Program, c: DefectConstraint) -> bool:
    """Return whether a constraint holds in sums only, for which its multiplier is laid out."""
    multiplier = program.multiplier_of(c.name)
    summed = multiplier is not None and not multiplier.laid.each
    return summed and c.transform.signed and c.transform.half_width == 0.0


def _rows_of(c: ValueConstraint, variables: set[str]) -> Iterator[str]:
    """Names of the requirements of a user's constraint."""
    if c.function is not None:
        yield c.name
        return
    for name in c.reads:
        label_ = c.name if len(c.reads) == 1 else f"{c.name}[{name}]"
        if name in variables:
            yield f"bounds of {name}"
        else:
            yield from (f"{label_} ({side})" for side in ("upper", "lower") if getattr(c, side) is not None)


def _moves(dtype: str) -> bool:
    found = getattr(torch, dtype.removeprefix("torch."), None)
    return isinstance(found, torch.dtype) and (found.is_floating_point or found.is_complex)
