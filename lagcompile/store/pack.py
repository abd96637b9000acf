"""State of a run as bytes: plain values as JSON, tensors as they lie in memory, a SHA-256 ahead of both.

In: nested dictionaries, lists and tuples of tensors, NumPy arrays, numbers, texts and None. Out: bytes, and the same
again, bit for bit. Invariant: nothing is unpickled, no code of a file runs; bytes that differ in any bit are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lagcompile.ir.base import DataError

HEAD = b"lagcompile state 1 sha256 "
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


def pack(value: Any) -> list[bytes | memoryview]:
    """Chunks that make up a file.

    Raises:
        DataError: a value is neither a tensor nor plain data.
    """
    tensors: list[Tensor] = []
    plain = json.dumps(_encoded(value, tensors, "state"))
    table = [[str(t.dtype), list(t.shape)] for t in tensors]
    chunks: list[bytes | memoryview] = [f"{json.dumps(table)}\n{plain}\n".encode(), *map(_raw, tensors)]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return [HEAD, digest.hexdigest().encode(), b"\n", *chunks]


def fingerprint(value: Any) -> str:
    """Digest of what `pack` takes: equal where the values are, bit for bit."""
    return bytes(pack(value)[1]).decode()


def unpack(data: bytes, source: str) -> Any:
    """What `pack` was given.

    Raises:
        DataError: the bytes are not those that `pack` made.
    """
    head, rest = data[: len(HEAD) + 65], memoryview(data)[len(HEAD) + 65 :]
    if not data.startswith(HEAD):
        raise DataError(f"{source} is damaged, or no checkpoint of this lagcompile")
    if head != HEAD + hashlib.sha256(rest).hexdigest().encode() + b"\n":
        raise DataError(f"{source} is damaged: its content does not have the SHA-256 that it was written with")
    try:
        table, plain, raw = bytes(rest).split(b"\n", 2)
        tensors, place = list[Tensor](), 0
        for name, shape in json.loads(table):
            tensor = torch.empty(shape, dtype=_DTYPES[name])
            size = tensor.numel() * tensor.element_size()
            if size:
                tensor = torch.frombuffer(bytearray(raw[place : place + size]), dtype=tensor.dtype).reshape(shape)
            tensors.append(tensor)
            place += size
        return _decoded(json.loads(plain), tensors)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, RecursionError) as error:
        raise DataError(f"{source} is no checkpoint of this lagcompile") from error


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.reshape(-1)
    return memoryview(b"") if not len(flat) else flat.view(torch.uint8).numpy().data


def _encoded(value: Any, tensors: list[Tensor], where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        tensors.append(value.detach().cpu().resolve_conj().resolve_neg().contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, np.ndarray):
        return {"array": _encoded(torch.from_numpy(np.array(value)), tensors, where)}
    if isinstance(value, Mapping):
        return {"map": [[_encoded(k, tensors, where), _encoded(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encoded(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]}
    raise DataError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors, numbers and texts only")


def _decoded(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "array":
        return _decoded(inner, tensors).numpy()
    if kind == "map":
        return {_decoded(k, tensors): _decoded(v, tensors) for k, v in inner}
    found = [_decoded(v, tensors) for v in inner]
    return found if kind == "list" else tuple(found)
