"""Archives of torch.export that run code when they are opened: three ways, each making a folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Touch:
    """Its pickled form makes a folder where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _archive() -> dict[str, bytes]:
    buffer = io.BytesIO()
    free = ({0: torch.export.Dim.AUTO},)
    program: Any = torch.export.export(_Double(), (torch.randn(3, 2),), dynamic_shapes=free)
    program._example_inputs = None  # else they are pickled, which a search for pickles would find
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {n: archive.read(n) for n in archive.namelist()}


def _zipped(entries: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def opaque(canary: Path) -> bytes:
    """A constant that is an object of Python's."""
    entries = _archive()
    (config,) = [n for n in entries if n.endswith("constants_config.json")]
    data = pickle.dumps(Touch(canary))
    bytes_ = {"dtype": 1, "sizes": [{"as_int": len(data)}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}}
    meta = {**bytes_, "layout": 7, "requires_grad": False, "device": {"type": "cpu", "index": None}}
    payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": meta}
    entries[config] = json.dumps({"config": {"c": payload}}).encode()
    entries[config.rpartition("/")[0] + "/opaque_obj_0"] = data
    return _zipped(entries)


def spaced(canary: Path) -> bytes:
    """A pickled weight, announced with two spaces: torch.load reads it with weights_only=False."""
    entries = _archive()
    (config,) = [n for n in entries if n.endswith("weights_config.json")]
    text = '{"config": {"w": {"path_name": "weight_0", "is_param": true, "use_pickle":  true, "tensor_meta": null}}}'
    entries[config] = text.encode()
    buffer = io.BytesIO()
    torch.save(Touch(canary), buffer)
    entries[config.rpartition("/")[0] + "/weight_0"] = buffer.getvalue()
    return _zipped(entries)


def symbolic(canary: Path) -> bytes:
    """A size that is an expression: it is evaluated as Python."""
    entries = _archive()
    (model,) = [n for n in entries if n.endswith("model.json")]
    text = entries[model].decode()
    expression = f"__import__('os').mkdir({str(canary)!r}) or Symbol('s77', positive=True, integer=True)"
    begin = text.index('"expr_str": "') + len('"expr_str": "')
    end = text.index('"', begin)
    entries[model] = (text[:begin] + json.dumps(expression)[1:-1] + text[end:]).encode()
    return _zipped(entries)
