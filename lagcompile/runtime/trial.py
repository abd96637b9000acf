"""Try the model and the loss on a few rows, before a run starts.

In: an instance. Out: nothing, or an error in the user's words. Invariant: buffers and modes are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lagcompile.frontend.capture import reason_of
from lagcompile.frontend.compare import gap, rounded
from lagcompile.frontend.receipt import first_line
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.structure import fill, leaves, opened
from lagcompile.frontend.trials import Trial, run
from lagcompile.ir.base import BindError, ProgramError
from lagcompile.ir.program import Program, ValueConstraint
from lagcompile.runtime.instance import INTEGERS, Instance, quiet

ROWS = 2
LOOKED = 64
"""Rows that are tried one by one where the loss is undefined on the first."""
IGNORED = -100
"""The class that `cross_entropy` leaves out."""
COMPARED, FEWER = 8, 5
"""Rows on which the network is compared with the model, in eval mode and in train mode."""


def check_inputs(program: Program, names: Sequence[str], tensors: Sequence[Tensor], *, shapes: bool = True) -> None:
    """Check inputs against those that the model was lifted with.

    Args:
        program: the program.
        names: the inputs' names, in order.
        tensors: the inputs.
        shapes: also compare the sizes that do not follow the number of examples.

    Raises:
        BindError: names each input of another type or shape.
    """
    types = {d.name: d.type for d in program.data}
    problems = []
    for name, tensor in zip(names, tensors, strict=True):
        kind, found = types[name], str(tensor.dtype).removeprefix("torch.")
        if kind.shape is None:
            continue
        if found != kind.dtype:
            problems.append(
                f"the input '{name}' holds {found} numbers, but the model was lifted with {kind.dtype}: convert the "
                f"data ({name}.to(torch.{kind.dtype})), or lift the model with inputs like these"
            )
        elif shapes and not _alike(kind.shape, tensor.shape):
            problems.append(
                f"the input '{name}' has the shape {list(tensor.shape)}, but the model was lifted with "
                f"[{', '.join(map(str, kind.shape))}]: lift it with inputs like these"
            )
    if problems:
        raise BindError(problems)


def _alike(known: Sequence[int | str], found: Sequence[int]) -> bool:
    return len(known) == len(found) and all(isinstance(k, str) or k == f for k, f in zip(known, found, strict=True))


def try_out(instance: Instance) -> None:
    """Run the network and the loss on the first rows, and on those with the least and largest whole numbers.

    Raises:
        BindError: the model or the loss fails, or the loss is not one number, is undefined or says nothing.
        ProgramError: the loss reduces over examples otherwise than the formulation says.
    """
    count = instance.sizes.near(min(ROWS, instance.examples), instance.examples)
    rows = torch.arange(count)
    loss = _tried(instance, rows, f"the first {len(rows)} examples")
    for what, row, value in _extremes(instance):
        if row >= count:
            several = torch.tensor([row, *range(count - 1)])  # normalisation may need more than one
            _tried(instance, several, f"example {row}, whose {what} holds {value}")
    one_number(loss)
    _try_loss(instance, rows, float(loss))
    said, does = instance.program.objective.reduction, _reduction(instance, rows, float(loss))
    if does is not None and does != said:
        weight = "less" if said == "mean" else "more"
        raise ProgramError(
            f"the loss is a {does} over examples, but the formulation says 'reduction: {said}': defects would weigh "
            f"{weight} than the loss by the batch size; write 'reduction: {does}', or give a loss that is a {said}"
        )
    _ = instance.draws  # determined here, where no method watches the network yet


def try_receipt(instance: Instance) -> None:
    """Compare the cut network with the model on the user's own data: outputs, buffers, random numbers, gradients.

    In eval mode on `COMPARED` rows that are spread over the data, in train mode on fewer.

    Raises:
        BindError: it is not the model there; the model has no backward pass; the data are of sizes that it was not
            captured for.
    """
    network, model = instance.network, instance.module
    signature = network.capture.signature
    problems: dict[str, None] = {}
    for training, most in ((False, COMPARED), (True, FEWER)):
        count = instance.sizes.near(min(most, instance.examples), instance.examples)
        rows = torch.linspace(0, instance.examples - 1, count, dtype=torch.float64).round().long()
        trial = Trial(training, tuple(t[rows.to(t.device)].to(instance.device) for t in instance.inputs), slopes=True)
        network.capture.sizes.check(signature.names, trial.tensors)
        try:
            expected = run(model, partial(signature.call, model), trial)
        except Exception as error:
            if training and _runs(model, signature, trial):
                raise BindError(
                    f"the model's own backward pass fails: {reason_of(error)}. No method can lower a loss without it: "
                    "give that operation a derivative, or take it out of the model"
                ) from error
            continue  # a mode that the model does not run in on such rows
        try:
            got = run(model, network.call, trial, graphs=network.graphs, calls=expected.calls)
        except Exception as error:
            problems[f"it does not run in {trial.mode} mode ({first_line(error)})"] = None
            continue
        moved = partial(rounded, model, partial(signature.call, model), trial, expected)
        problems |= dict.fromkeys(f"in {trial.mode} mode {p}" for p in gap(expected, got, moved).problems)
    if problems:
        raise BindError(["on these data the lifted network is not the model:", *problems])


def _runs(model: nn.Module, signature: Signature, trial: Trial) -> bool:
    """Whether a model runs at all, without gradients."""
    try:
        run(model, partial(signature.call, model), replace(trial, slopes=False))
    except Exception:
        return False
    return True


def _try_loss(instance: Instance, rows: Tensor, first: float) -> None:
    """Check that a loss can be lowered: it is defined somewhere, and depends on the model's output.

    Raises:
        BindError: it is NaN on all examples looked at, or takes no gradient.
    """
    if math.isnan(first):
        count = min(LOOKED, instance.examples)
        spread = torch.linspace(0, instance.examples - 1, count, dtype=torch.float64).round().long()
        if all(_undefined(instance, r) for r in spread.split(instance.sizes.near(1, instance.examples))):
            target = instance.target
            ignored = isinstance(target, Tensor) and target.dtype in INTEGERS and bool((target == IGNORED).all())
            why = (
                f"each target is {IGNORED}, which cross_entropy ignores: give class numbers from 0"
                if ignored
                else "look for a logarithm, a root, a division or an overflow in the model or the loss; scale the data"
            )
            raise BindError(f"the loss is not a number (NaN) on each of the {count} examples looked at: {why}")
    further = any(isinstance(c, ValueConstraint) for c in instance.program.constraints)
    if not further and not instance.program.objective.regularisers and _silent(instance, rows):
        raise BindError(
            "the loss takes no gradient from the model's output: it is constant, or cut off by detach(), argmax() or "
            "item(), so that nothing could lower it; write it in torch operations on the output"
        )


def _undefined(instance: Instance, rows: Tensor) -> bool:
    try:
        return math.isnan(float(_loss(instance, rows)))
    except Exception:  # these rows may be too few: nothing is known
        return False


def _silent(instance: Instance, rows: Tensor) -> bool:
    """Return whether the loss neither has a gradient in the model's output nor changes with it."""
    with torch.no_grad(), quiet(instance.module):
        batch = instance.batch(rows)
        template = opened(instance.output(instance.forward(batch)[1]))
        tensors = [v for v in leaves(template) if isinstance(v, Tensor)]
        moving = [v for v in tensors if v.is_floating_point() or v.is_complex()]

        def value(moved: Sequence[Tensor]) -> Tensor:
            new = dict(zip(map(id, moving), (v.clone() for v in moved), strict=True))  # a loss may write into them
            return one_number(instance.loss(fill(template, lambda leaf: new.get(id(leaf), leaf)), batch.target))

        with torch.enable_grad():
            given = [v.detach().clone().requires_grad_() for v in moving]
            here = value(given)
            if not here.requires_grad:
                return True
            found = torch.autograd.grad(here, given, materialize_grads=True)
        if any(bool(g.any()) for g in found):
            return False
        return torch.equal(here, value([v + torch.linspace(0.5, 1.5, v.numel()).view(v.shape).to(v) for v in moving]))


def _reduction(instance: Instance, rows: Tensor, once: float) -> str | None:
    """Return how the loss reduces, from its value where every row occurs twice; None where that does not tell."""
    if instance.examples == 1 or not math.isfinite(once) or abs(once) < 1e-12:
        return None  # one example: mean and sum are the same
    try:
        growth = float(_loss(instance, rows.repeat(2))) / once
    except Exception:  # a model of one batch size
        return None
    names = {"mean": 1.0, "sum": 2.0}
    return next((name for name, ratio in names.items() if math.isclose(growth, ratio, rel_tol=1e-4)), None)


def one_number(value: object) -> Tensor:
    """Check the value of a user's loss, which may be anything.

    Raises:
        BindError: it is not one number.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return value
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    shape = f"a number of type {value.dtype}" if isinstance(value, Tensor) and not value.dim() else shape
    raise BindError(f"the loss must give one number for a batch, it gave {shape}")


def try_batches(instance: Instance, sizes: Iterable[int]) -> None:
    """Run the network once in train mode for each size of batch that a run will see.

    Raises:
        BindError: the model or the loss fails on one of them.
    """
    module = instance.module
    modes = [(m, m.training) for m in module.modules()]
    module.train()
    try:
        for size in sorted(set(sizes)):
            what = f"a batch of {size} of the {instance.examples} examples"
            _tried(instance, torch.arange(size), what, "Choose another batch_size")
    finally:
        for part, mode in modes:
            part.training = mode


def _tried(instance: Instance, rows: Tensor, what: str, advice: str = "") -> Tensor:
    try:
        return _loss(instance, rows)
    except Exception as error:
        text = f"the model or the loss fails on {what}: {error}"
        raise BindError(f"{text}. {advice}" if advice else text) from error


def _extremes(instance: Instance) -> Iterator[tuple[str, int, int]]:
    """Return rows with the least and largest number of each column of whole numbers: indices may be out of range."""
    columns = dict(zip(instance.network.capture.signature.names, instance.inputs, strict=True))
    for what, column in {**columns, "target": instance.target}.items():
        if isinstance(column, Tensor) and column.dtype in INTEGERS and column.numel():
            flat = column.reshape(len(column), -1)
            least, largest = flat.amin(1), flat.amax(1)
            yield what, int(least.argmin()), int(least.min())
            yield what, int(largest.argmax()), int(largest.max())


def _loss(instance: Instance, rows: Tensor) -> Tensor:
    with torch.no_grad(), quiet(instance.module):
        return _run(instance, rows)


def _run(instance: Instance, rows: Tensor) -> Tensor:
    batch = instance.batch(rows)
    _, values = instance.forward(batch)
    return instance.loss(instance.output(values), batch.target)


def draws(instance: Instance) -> bool:
    """Return whether a forward pass in train mode, or the loss, draws from the default generators."""
    modes = [(m, m.training) for m in instance.module.modules()]
    try:
        with torch.no_grad(), quiet(instance.module):
            instance.module.train()
            before = _random_state(instance.device)
            _run(instance, torch.arange(instance.sizes.near(min(ROWS, instance.examples), instance.examples)))
            return not torch.equal(before, _random_state(instance.device))
    except Exception:  # these rows may be too few: then it may draw
        return True
    finally:
        for module, mode in modes:
            module.training = mode


def _random_state(device: torch.device) -> Tensor:
    host = torch.get_rng_state()
    return torch.cat([host, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else host
