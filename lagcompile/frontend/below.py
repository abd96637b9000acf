"""Capture below autograd: for models whose forward takes derivatives, or maps a function over examples.

In: a private copy of the model, its signature, example tensors. Out: `Traced`, a graph of the operations that ran, also
of those that derivatives are made of. Invariant: what the model cuts off (`detach`, blocks without gradients,
derivatives without `create_graph`) has no gradient in the graph either; what autograd kept for a derivative has.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch import library as operators
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lagcompile.frontend.capture import batch_of
from lagcompile.frontend.export import quietly
from lagcompile.frontend.guards import sizes_of
from lagcompile.frontend.proxies import detached, unchecked_distributions
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.still import Before
from lagcompile.frontend.structure import Reference, leaves, opened, transform
from lagcompile.frontend.symbolic import Traced

_SHAPED = {
    "aten.squeeze_.dim": torch.ops.aten.squeeze.dim,
    "aten.squeeze_.dims": torch.ops.aten.squeeze.dims,
    "aten.unsqueeze_.default": torch.ops.aten.unsqueeze.default,
    "aten.transpose_.default": torch.ops.aten.transpose.int,
}
_DETACH = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


class Derivatives(TorchFunctionMode):
    """Notes whether a forward takes derivatives, or runs within `vmap` or `grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.met = self.met or func is torch.autograd.grad or torch._C._functorch.maybe_current_level() is not None
        return func(*args, **(kwargs or {}))


class _CutOff(TorchFunctionMode):
    """Marks what the model takes out of its gradient, which the graph could not tell from what autograd does."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        found = func(*args, **given)
        last = func is torch.autograd.grad and not given.get("create_graph")
        if func not in _DETACH and not last and torch.is_grad_enabled():
            return found
        return pytree.tree_map_only(Tensor, _stop().target, found)


def record(model: nn.Module, signature: Signature, tensors: Sequence[Tensor], *, dynamic: bool = True) -> Traced:
    """Graph of a model in the mode that it is in.

    Args:
        model: the private copy; it is left as it was.
        signature: how it is called.
        tensors: example inputs.
        dynamic: leave the size of the first axis free where all inputs share it.

    Raises:
        Exception: what the model's Python raises on tensors without values.
    """
    before = Before(model)
    state = {**dict(model.named_parameters()), **before.held}
    template: list[Any] = []

    def run(values: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Any]:
        weights = dict(zip(state, values, strict=True))
        with _CutOff():
            call = functools.partial(functional_call, model, weights)
            output = opened(signature.call(lambda *args, **kwargs: call(args, kwargs), [t.clone() for t in inputs]))
        template[:] = [transform(output, lambda v: Reference("") if isinstance(v, Tensor | torch.SymInt) else v)]
        return [v for v in leaves(output) if isinstance(v, Tensor | torch.SymInt)]

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    free = dynamic and (batch_of(tensors) or 1) > 1
    try:
        with quietly(), torch.enable_grad(), unchecked_distributions():
            weights = [_fake(mode, n, t, free=False) for n, t in state.items()]
            inputs = [_fake(mode, n, t, free=free) for n, t in zip(signature.names, tensors, strict=True)]
            found = make_fx(run, tracing_mode="symbolic", record_stack_traces=True)(weights, inputs)
    finally:
        before.put_back()
    return _converted(found, list(state), signature, tensors, template[0])


def _fake(mode: FakeTensorMode, name: str, tensor: Tensor, *, free: bool) -> Tensor:
    sizes = [DimDynamic.DYNAMIC if free and i == 0 else DimDynamic.STATIC for i in range(tensor.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(tensor, source=ConstantSource(name), symbolic_context=context)


def _converted(
    found: fx.GraphModule, state: Sequence[str], signature: Signature, tensors: Sequence[Tensor], template: Any
) -> Traced:
    """The graph over the copy's own weights."""
    graph, env, attributes = fx.Graph(), {}, {}
    nodes = list(found.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    for node, name in zip(placeholders[len(state) :], signature.names, strict=True):
        env[node] = graph.placeholder(name)
    for node, name in zip(placeholders, state, strict=False):
        env[node] = graph.get_attr(name)
    for node in nodes:
        if node.op == "get_attr":
            attributes[str(node.target)] = getattr(found, str(node.target))
        if node.op in {"placeholder", "output"}:
            continue
        if node.target is torch.ops.aten.detach.default:  # autograd's own, of what it kept
            env[node] = env[node.args[0]]
        elif node.target is _stop().target:
            env[node] = graph.call_function(detached, (env[node.args[0]],))
        else:
            made = graph.node_copy(node, env.__getitem__)
            if (shaped := _SHAPED.get(str(node.target))) is not None:  # written by vmap's own rules, on fresh values
                made.target = shaped
                env[node.args[0]] = made
            env[node] = made
        env[node].meta.setdefault("source", "")
    outputs = [env[n] for n in nodes[-1].args[0]]
    names = iter(outputs)
    graph.output(tuple(outputs))
    filled = transform(template, lambda v: Reference(next(names).name) if isinstance(v, Reference) else v)
    given = SimpleNamespace(user_inputs=[n.name for n in placeholders[len(state) :]])
    sizes = sizes_of(SimpleNamespace(graph_module=found, graph_signature=given), tensors)
    return Traced(graph, filled, {}, {}, attributes, sizes)


class _Declared:
    """An operator together with its declaration (the operator goes when the declaration is collected)."""

    def __init__(self, declared: operators.Library, target: Any) -> None:
        self.declared, self.target = declared, target


@functools.cache
def _stop() -> _Declared:
    """The operator that stands for an end of gradients; it exists for the recorder only."""
    declared = operators.Library("lagcompile_below", "FRAGMENT")
    declared.define("stop(Tensor value) -> Tensor")
    declared.impl("stop", lambda value: value.clone(), "CompositeExplicitAutograd")
    return _Declared(declared, torch.ops.lagcompile_below.stop.default)
