"""The models of the coverage table: how to build one of each, small, with inputs.

In: a family's name. Out: name -> a function that builds (model, args, kwargs). Invariant: weights are random, nothing
is downloaded; the libraries are imported only here, and only when asked for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lagcompile.ir.base import MissingExtraError, SpecError

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Subject = Callable[[], Built]


def subjects_of(family: str) -> Mapping[str, Subject]:
    """Models of a family.

    Raises:
        SpecError: an unknown family.
        MissingExtraError: its library is not installed.
    """
    known: dict[str, Callable[[], Mapping[str, Subject]]] = {
        "torchvision": _torchvision,
        "timm": _timm,
        "transformers": _transformers,
    }
    if family not in known:
        raise SpecError(f"no family '{family}': there are {', '.join(known)}")
    try:
        return known[family]()
    except ImportError as error:
        raise MissingExtraError(
            f"the family '{family}' needs {error.name}: pip install 'lagcompile[coverage]'"
        ) from error


def operator_names() -> None:
    """Declare torchvision's operators where its compiled library does not load (torch without CUDA, for one).

    Its classification models use none of them, but its import looks their names up.
    """
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for declaration in _OPERATORS:
            _library().define(declaration)
        import torchvision  # noqa: F401


_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("torchvision", "FRAGMENT")


# ------------------------------------------------------------------ torchvision
_SIZES = {"inception_v3": 75, "maxvit_t": 224}


def _torchvision() -> Mapping[str, Subject]:
    operator_names()
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return {n: functools.partial(_vision, n) for n in names}


def _vision(name: str) -> Built:
    import torchvision

    size = _SIZES.get(name, 224 if name.startswith("vit") else 64)
    extra = {"init_weights": True} if name in {"inception_v3", "googlenet"} else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    return model, (torch.randn(2, 3, size, size),), {}


# ------------------------------------------------------------------ timm
def _timm() -> Mapping[str, Subject]:
    operator_names()
    import timm

    return {f"{module} ({name})": functools.partial(_image, name) for module, name in _smallest(timm).items()}


def _smallest(timm: Any) -> Mapping[str, str]:
    """For each family (module) of timm its member with the fewest parameters."""
    chosen = {}
    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                try:
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
                except Exception:
                    sizes[name] = 10**12
        if sizes:
            chosen[module] = min(sizes, key=lambda n: sizes[n])
    return chosen


def _image(name: str) -> Built:
    import timm

    model = timm.create_model(name, num_classes=10)
    channels, default, _ = timm.get_pretrained_cfg(name, allow_unregistered=True).input_size
    for size in (64, 96, 128, default):
        x = torch.randn(2, channels, size, size)
        try:
            with torch.no_grad():
                model.eval()(x)
        except Exception:
            if size == default:
                raise
            continue
        break
    return timm.create_model(name, num_classes=10), (x,), {}


# ------------------------------------------------------------------ transformers
def _transformers() -> Mapping[str, Subject]:
    operator_names()  # transformers imports torchvision where it finds it
    from lagcompile.workbench.architectures import architectures

    return architectures()
