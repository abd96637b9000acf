"""Runs of a model, and of what was made of it, that are to be compared.

In: a model with example inputs. Out: `Trial`s (a mode, inputs, weights), and for each the `Outcome` of whoever runs it:
outputs, buffers, random numbers, gradients. Invariant: nothing is left changed; what is compared ran from one start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lagcompile.frontend.capture import batch_of
from lagcompile.frontend.still import Attributes, Before, as_it_was, random_states
from lagcompile.frontend.structure import leaves, opened, transform
from lagcompile.frontend.tensors import dense, identical

Call = Callable[[list[Tensor]], Any]
SKETCH = 4096
"""Numbers that are kept of a large gradient."""


@dataclass(frozen=True)
class Trial:
    """One run to compare.

    Attributes:
        training: the mode.
        tensors: the inputs.
        varied: at other weights than the model's own.
        slopes: with gradients of a random projection of the outputs.
    """

    training: bool
    tensors: tuple[Tensor, ...]
    varied: bool = False
    slopes: bool = False

    @property
    def mode(self) -> str:
        """The mode by name."""
        return "train" if self.training else "eval"

    @property
    def size(self) -> int:
        """Batch size; 1 where the inputs have no common first axis."""
        return batch_of(self.tensors) or 1


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        structure: containers of the output, with a placeholder for each leaf.
        values: leaves of the output that are not tensors.
        numbers: tensors by what they are: outputs, buffers, gradients (a sketch of large ones, None where there are
            none).
        changed: names of buffers that changed.
        drawn: states of the random generators afterwards.
        random: whether they moved.
        attributes: Python attributes that the first call changed.
        calls: how often it was called: more than once where there are such.
    """

    structure: Any
    values: tuple[Any, ...]
    numbers: Mapping[str, Tensor | None]
    changed: tuple[str, ...]
    drawn: tuple[Any, ...]
    random: bool
    attributes: tuple[str, ...] = ()
    calls: int = 1


@dataclass
class Known:
    """What runs of one model tell later ones.

    Attributes:
        attributes: of its modules, as they were met.
        weights: other weights, once they were made up.
    """

    attributes: dict[str, Attributes] = field(default_factory=dict)
    weights: dict[nn.Parameter, Tensor] = field(default_factory=dict)


def run(
    model: nn.Module,
    call: Call,
    trial: Trial,
    *,
    graphs: Sequence[nn.Module] = (),
    rounding: bool = False,
    calls: int = 0,
    known: Known | None = None,
) -> Outcome:
    """Run a trial.

    Args:
        model: holds weights and buffers; it is left as it was.
        call: what runs: the model, or what was made of it.
        graphs: graphs over the model's parts that run.
        rounding: move weights and inputs in their last place, to learn how much rounding does to the result.
        calls: how often to call it; 0: once, and where that changes Python attributes twice more, the last time with
            counters far ahead.
        known: what earlier runs of the model tell.

    Raises:
        Exception: what the user's own code raises.
    """
    known = known or Known()
    weights = _varied(model, trial.varied, rounding, known.weights) if trial.varied or rounding else nullcontext()
    with weights, as_it_was(model, trial.training, also=graphs, slopes=trial.slopes, known=known.attributes) as before:
        start = random_states(model)
        numbers, first = _once(model, call, trial, rounding, before, "")
        attributes = tuple(before.changed())
        now = before.buffers_now().items()
        changed = tuple(n for n, b in now if n not in before.buffers or not identical(b, before.buffers[n]))
        drawn = random_states(model)
        values = tuple(v for v in leaves(first) if not isinstance(v, Tensor))
        structure = transform(first, lambda v: (v.dtype, v.device) if isinstance(v, Tensor) else None)
        made = 1
        if attributes or calls > 1:
            numbers |= _once(model, call, trial, rounding, before, " of a second call")[0]
            made = 2
            before.count_on()
            with suppress(Exception):  # the user's own code, on a counter that never gets so far
                if calls != 2:
                    numbers |= _once(model, call, trial, rounding, before, " of a later call")[0]
                    made = 3
        return Outcome(structure, values, numbers, changed, drawn, drawn != start, attributes, made)


def _once(
    model: nn.Module, call: Call, trial: Trial, rounding: bool, before: Before, suffix: str
) -> tuple[dict[str, Tensor | None], Any]:
    given = {f"input {i}": _input(t, trial.slopes, rounding) for i, t in enumerate(trial.tensors)}
    # clones: a forward that writes into its inputs may not write into leaves of autograd
    output = opened(call([t.clone() for t in given.values()]))
    tensors = [(i, v) for i, v in enumerate(leaves(output)) if isinstance(v, Tensor)]
    numbers: dict[str, Tensor | None] = {f"output {i}{suffix}": v.detach().clone() for i, v in tensors}
    numbers |= {f"buffer {n}{suffix}": b.detach().clone() for n, b in before.buffers_now().items()}
    if trial.slopes:
        wanted = {n: t for n, t in {**dict(model.named_parameters()), **given}.items() if t.requires_grad}
        numbers |= {f"gradient of {n}{suffix}": g for n, g in _slopes([v for _, v in tensors], wanted).items()}
    return numbers, output


def _input(tensor: Tensor, slopes: bool, rounding: bool) -> Tensor:
    value = tensor.detach().clone()
    if rounding and _is_real(value):
        value = value * (1 + torch.finfo(value.dtype).eps * _noise(value, 7))
    return value.requires_grad_(slopes and (_is_real(value) or value.is_complex()))


def _slopes(outputs: Sequence[Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients of a random projection of the outputs that have any."""
    known = [v for v in outputs if v.requires_grad]
    if not known or not wanted:
        return dict.fromkeys(wanted)
    weights = [_noise(v, 11 + i) for i, v in enumerate(known)]
    found = torch.autograd.grad(known, list(wanted.values()), grad_outputs=weights, allow_unused=True)
    return {n: _sketch(g) for n, g in zip(wanted, dense(found), strict=True)}


def _sketch(gradient: Tensor | None) -> Tensor | None:
    """Few numbers that tell two large gradients apart: random sums of its rows."""
    if gradient is None:
        return None
    if gradient.numel() <= 2 * SKETCH:
        return gradient.clone()
    flat = gradient.flatten()
    whole = len(flat) // SKETCH * SKETCH
    rows = flat[:whole].view(-1, SKETCH)
    summed = _noise(rows[:, 0], 5) @ rows
    summed[: len(flat) - whole] += flat[whole:]
    return summed


_TILE = 4099


def _tile(like: Tensor, seed: int) -> Tensor:
    """At most `_TILE` numbers in [-1, 1]: the same few, from another start for each seed."""
    start = seed * 577 % _TILE
    return _drawn(like.device, like.dtype)[start : start + min(_TILE, like.numel())]


@cache
def _drawn(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers in [-1, 1]; drawn from no generator that the model draws from."""
    with torch.inference_mode(mode=False):
        generator = torch.Generator().manual_seed(11)
        few = torch.rand(2 * _TILE, generator=generator, dtype=torch.float64, device="cpu")
        return (2 * few - 1).to(device, dtype)


def _noise(like: Tensor, seed: int) -> Tensor:
    """Numbers in [-1, 1], the same for every tensor of a shape: a tile of them, repeated."""
    few = _tile(like, seed)
    return few.repeat(-(-like.numel() // max(len(few), 1)))[: like.numel()].view(like.shape)


def _scaled(flat: Tensor, few: Tensor) -> Tensor:
    """The product with a tile, repeated."""
    made = torch.empty_like(flat)
    whole = len(flat) // len(few) * len(few)
    torch.mul(flat[:whole].view(-1, len(few)), few, out=made[:whole].view(-1, len(few)))
    torch.mul(flat[whole:], few[: len(flat) - whole], out=made[whole:])
    return made


@contextmanager
def _varied(model: nn.Module, other: bool, rounding: bool, made: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Other weights of the same signs and about the same size, or the same up to rounding, in other memory."""
    held = [(p, p.data) for p in model.parameters() if _is_real(p) and p.numel()]
    try:
        with torch.no_grad():
            for i, (p, before) in enumerate(held):
                if other and p not in made:
                    made[p] = _placed(_other(before.reshape(-1), 1000 + i), before)
                value = made[p] if other else before
                if rounding:
                    few = 1 + torch.finfo(p.dtype).eps * _tile(p, 2000 + i)
                    value = _placed(_scaled(value.reshape(-1), few), before)
                p.data = value
        yield
    finally:
        for p, before in held:
            p.data = before


def _other(flat: Tensor, seed: int) -> Tensor:
    """Other numbers than a weight's, none of them zero."""
    value = _scaled(flat, 1 + 0.2 * _tile(flat, seed))
    if bool(value.abs().min() > 0):
        return value
    size = value.square().mean().sqrt()
    bump = 0.1 * torch.where(size > 0, size, torch.full_like(size, 0.5))
    return torch.where(value == 0, bump * _noise(value, seed), value)


def _placed(flat: Tensor, like: Tensor) -> Tensor:
    """The numbers in the form of another tensor."""
    value = flat.view(like.shape)
    return value if like.is_contiguous() else torch.empty_like(like).copy_(value)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


# ------------------------------------------------------------ which runs
def resized(tensors: Sequence[Tensor], size: int) -> list[Tensor]:
    """The inputs with `size` examples, repeated where there are fewer; as they are where no axis is common."""
    batch = batch_of(tensors)
    if not batch:
        return list(tensors)
    rows = torch.arange(size) % batch
    return [t.index_select(0, rows.to(t.device)) if t.dim() else t for t in tensors]


def negated(tensor: Tensor) -> Tensor:
    """Other values: with other signs and sizes; whole numbers are in another order."""
    return -1.5 * tensor if _is_real(tensor) else tensor.flip(tuple(range(tensor.dim())))


def grown(tensor: Tensor) -> Tensor:
    """Other values: much larger ones, all positive, in another order."""
    flipped = tensor.flip(tuple(range(tensor.dim())))
    return 100 * flipped.abs() + 10 if _is_real(tensor) else flipped


def emptied(tensor: Tensor) -> Tensor:
    """Zeros."""
    return torch.zeros_like(tensor) if _is_real(tensor) else tensor


def with_values(trial: Trial, change: Callable[[Tensor], Tensor]) -> Trial:
    """A trial on other values of the inputs."""
    return replace(trial, tensors=tuple(change(t) for t in trial.tensors))
