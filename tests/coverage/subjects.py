"""The models of the coverage table: how to build one of each, small, with inputs.

In: a family's name. Out: name -> a function that builds (model, args, kwargs). Invariant: weights are random, nothing
is downloaded; the libraries are imported only here, and only when asked for.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import library as operators
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
            _declarations().define(declaration)
        import torchvision  # noqa: F401


_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def _declarations() -> operators.Library:
    return operators.Library("torchvision", "FRAGMENT")


# ------------------------------------------------------------------ torchvision
def _torchvision() -> Mapping[str, Subject]:
    operator_names()
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return {n: functools.partial(_vision, n) for n in names}


def _vision(name: str) -> Built:
    import torchvision

    extra = {"init_weights": True} if name in {"inception_v3", "googlenet"} else {}
    build = functools.partial(torchvision.models.get_model, name, weights=None, **extra)
    return _smallest(build, "image_size" if name.startswith("vit") else "", (3, 224))


def _smallest(build: Callable[..., nn.Module], option: str, default: tuple[int, int]) -> Built:
    """A model with the smallest square image that it takes, tried on tensors without values.

    Args:
        build: makes the model.
        option: argument of `build` that fixes the size of the image, where there is one.
        default: channels of the image and the size that the model was made for.
    """
    channels, largest = default
    for size in (32, 64, 84, 96, 128, largest, 299):
        for extra in ({option: size}, {}) if option else ({},):
            if _takes(functools.partial(build, **extra), (channels, size, size)):
                # batch normalisation over two single pixels has no gradient to certify
                return build(**extra), (torch.randn(4 if size <= 64 else 2, channels, size, size),), {}
    return build(), (torch.randn(2, channels, largest, largest),), {}


def _takes(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> bool:
    """Whether a model runs in both modes; tensors of values only where it cannot be built without them."""
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = build()
        except Exception:  # it computes its sizes with tensors, or does not know the option
            continue
        try:
            with torch.device(device), torch.no_grad():
                model.eval()(torch.zeros(2, *shape))
                model.train()(torch.zeros(3, *shape))
            return True
        except Exception:  # whatever the model says: it is tried with another size
            return False
    return False


# ------------------------------------------------------------------ timm
def _timm() -> Mapping[str, Subject]:
    operator_names()
    import timm

    members = {module: timm.list_models(module=module) for module in timm.list_modules()}
    chosen = {module: _small(names) for module, names in members.items() if names}
    return {f"{module} ({name})": functools.partial(_image, name) for module, name in chosen.items()}


# Words in names of small members, smallest first.
_SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "xxtiny", "xtiny", "tiny", "_ti_", "_xs", "small")
_LARGE = re.compile(r"_(l|xl|h|x|b|m)(_|$)|base|large|huge|giant")


def _small(names: Sequence[str]) -> str:
    """The member of a timm family whose name says that it is small: by word, else by the numbers in it.

    Building all members to count their parameters takes many minutes.
    """

    def key(name: str) -> tuple[int, list[int], str]:
        rank = next((i for i, word in enumerate(_SMALL) if word in name), len(_SMALL) + bool(_LARGE.search(name)))
        return rank, [int(n) for n in re.findall(r"\d+", name)], name

    return min(names, key=key)


def _image(name: str) -> Built:
    import timm

    channels, size, _ = timm.get_pretrained_cfg(name, allow_unregistered=True).input_size
    return _smallest(functools.partial(timm.create_model, name, num_classes=10), "img_size", (channels, size))


# ------------------------------------------------------------------ transformers
def _transformers() -> Mapping[str, Subject]:
    operator_names()  # transformers imports torchvision where it finds it
    from tests.coverage.architectures import architectures

    return architectures()
