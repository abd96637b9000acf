"""Example inputs from the types of a network's inputs, where the user gives none.

In: a `Network` whose shapes are known. Out: tensors in the order of the call. Invariant: the batch has three examples
(a size that no other axis is likely to have), or another size that the capture holds for; values are valid for
embeddings, masks and layers alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lagcompile.frontend.capture import Sizes
from lagcompile.frontend.graph import dtype_of
from lagcompile.frontend.stages import Network
from lagcompile.ir.base import LiftError

SIZES = (3, 2, 4, 17)


def batch_sizes(sizes: Sizes) -> tuple[int, int, int, int]:
    """Batch size that is exported, two near it and one far from it, where the capture holds for them."""
    near = range(sizes.least, sizes.least + 9 * sizes.step, sizes.step)
    found = list(dict.fromkeys(n for n in (*SIZES, *near) if sizes.allow(n)))
    found += found[:1] * 3
    return found[0], found[1], found[2], found[3]


def examples_of(network: Network, batch: int | None = None) -> list[Tensor]:
    """Draw random numbers for floating inputs; integers and masks are ones.

    Args:
        network: a lifted network.
        batch: number of examples, where the batch size is free; None for the one that is exported.

    Raises:
        LiftError: the shapes are not known.
    """
    batch = batch_sizes(network.capture.sizes)[0] if batch is None else batch
    generator = torch.Generator().manual_seed(0)
    found = []
    for name in network.capture.signature.names:
        node = network.partition.graph.by_name[name]
        if node.type is None or node.type.shape is None:
            raise LiftError(f"the shape of the input '{name}' is not known: give example_inputs")
        shape = [d if isinstance(d, int) else batch * int(d.removesuffix("B") or 1) for d in node.type.shape]
        dtype = dtype_of(node.type.dtype)
        if dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype))
        else:
            found.append(torch.ones(shape, dtype=dtype))
    return found


def rows_of(tensors: Sequence[Tensor]) -> int:
    """Return the number of examples, the size of the first axis; 1 where there is none."""
    return next((t.shape[0] for t in tensors if t.dim()), 1)
