"""The module that replaces a model whose source is absent: its tensors under the user's names, and its network.

In: tensors, the call, the output's template. Out: `ExportedModel`. Invariant: parameters, buffers, ties and state_dict
keys are those of the model that was exported; `forward` runs the network that was never cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from lagcompile.export.record import TensorRecord
from lagcompile.frontend.capture import ModeOutput
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.structure import Reference, fill


@dataclass
class Exported:
    """An `ExportedModel` besides its tensors; one attribute, so that it takes none of the user's names."""

    model: str
    signature: Signature
    output: Any
    returns: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    network: fx.GraphModule | None = None


class ExportedModel(nn.Module):
    """A model from an exported folder: called as the model was, with its state_dict keys."""

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.__dict__["_exported"] = (exported,)  # in a tuple, so that the network is not a child of this module

    @property
    def exported(self) -> Exported:
        """Call, output and network."""
        found: Exported = self.__dict__["_exported"][0]
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Assemble the model's output; records with the same fields replace the user's classes."""
        own = self.exported
        assert own.network is not None
        tensors = own.signature.flatten(args, kwargs)
        flat = own.network(*tensors, *(_tensor(self, n) for n in own.tensors))
        values = dict(zip(own.returns, flat, strict=True))
        template = own.output
        if isinstance(template, ModeOutput):
            template = template.train if self.training else template.evaluation
        return fill(template, lambda v: values[v.name] if isinstance(v, Reference) else v)

    def extra_repr(self) -> str:
        """The class of the model that was exported."""
        return f"exported from {self.exported.model}"


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    for part in path.split(".") if path else ():
        child = module._modules[part]
        assert child is not None
        module = child
    found = module._parameters.get(last)
    if found is None:
        found = module._buffers[last]  # type: ignore[assignment]
    assert found is not None
    return found


def fill_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    records: Mapping[str, TensorRecord],
    ties: Mapping[str, tuple[str, ...]],
) -> None:
    """Give a model its tensors, under all their names.

    Args:
        model: an empty module.
        tensors: values by name.
        records: what each of them is.
        ties: name of a tensor -> its other names.
    """
    for name, record in records.items():
        value = tensors[name]
        own: Tensor = nn.Parameter(value, requires_grad=record.trainable) if record.kind == "parameter" else value
        for alias in (name, *ties.get(name, ())):
            path, _, last = alias.rpartition(".")
            owner = _container(model, path)
            if isinstance(own, nn.Parameter):
                owner.register_parameter(last, own)
            else:
                owner.register_buffer(last, own, persistent=record.kind == "buffer" and record.persistent)


def _container(model: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in model._modules:
            model.add_module(part, nn.Module())
        child = model._modules[part]
        assert child is not None
        model = child
    return model
