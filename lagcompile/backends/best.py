"""The best iterate of a run, judged by what the stored weights do.

In: the objective of a network on fixed rows, and its weights. Out: `Best`. Invariant: a score belongs to the weights
that are kept with it; judging changes nothing (buffers, modes, random numbers); the start is the first candidate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lagcompile.frontend.capture import Sizes
from lagcompile.ir.base import SpecError
from lagcompile.ir.solution import Status
from lagcompile.runtime import kkt
from lagcompile.runtime.instance import Instance, quiet

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Numbers of a module on held-out data."""
FEWEST, MOST = 64, 256
"""Rows of the probe: as many as a batch has, within these limits."""
ROUNDING = 1e-6
"""Relative difference below which two scores count as equal."""


class Best:
    """The best iterate so far.

    Attributes:
        start: score of the start; infinite where its loss is not finite.
        value: lowest score so far.
        step: number of steps behind it.
        last: score of the iterate that was judged last; NaN where its tensors are not finite.
        kept: weights and buffers of the best iterate by name.
        inputs: its free inputs by name.
    """

    def __init__(
        self,
        score: Callable[[], float],
        weights: Callable[[], Mapping[str, Tensor]],
        inputs: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        """Judge the start.

        Args:
            score: objective of the present weights; infinite where it is not finite, NaN where they are not.
            weights: the present weights and buffers.
            inputs: the present free inputs.
        """
        self._score, self._weights, self._inputs = score, weights, inputs
        self.start = self.value = self.last = score()
        self._keep(0)

    def _keep(self, step: int) -> None:
        self.step = step
        self.kept = {n: v.detach().clone() for n, v in self._weights().items()}
        self.inputs = self._inputs()

    def offer(self, step: int) -> bool:
        """Judge the present weights and keep them where they are better than all before; whether they are of use."""
        self.last = self._score()
        if self.last < self.value:
            self.value = self.last
            self._keep(step)
        return not (math.isnan(self.last) or self.last == math.inf > self.value)

    def ended(self, status: Status, step: int) -> tuple[Status, bool]:
        """Status of a run that ends here, and whether the best iterate is returned in place of the last."""
        if not self.offer(step):
            return (status if status is Status.INTERRUPTED else Status.DIVERGED), True
        worse = self.last > self.start + ROUNDING * abs(self.start)
        if worse and status in (Status.STEPS_DONE, Status.TIME_LIMIT):
            return Status.WORSE, False  # weights, states and multipliers belong together; the best weights are kept
        return status, worse or status is Status.DIVERGED

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs to judge as the unbroken one would."""
        return {"start": self.start, "value": self.value, "step": self.step, "kept": self.kept, "inputs": self.inputs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self.start, self.value, self.step = float(state["start"]), float(state["value"]), int(state["step"])
        self.kept, self.inputs = dict(state["kept"]), dict(state["inputs"])

    def numbers(self) -> dict[str, float]:
        """Scores of the start, the best and the last iterate."""
        return {"start": self.start, "best": self.value, "last": self.last}


class Probe:
    """The program's objective on fixed rows, at zero defects: the network's own loss in eval mode and regularisers."""

    def __init__(self, instance: Instance, batch_size: int) -> None:
        self.instance = instance
        self.rows = probe_rows(instance.examples, batch_size, instance.sizes)
        self.undefined: list[Tensor] = []
        """Rows of batches on which the loss was NaN, the last time."""
        self._training = False

    def __call__(self, inputs: Mapping[str, Tensor]) -> float:
        """Objective of the present weights.

        Args:
            inputs: values of the free inputs, all rows, by name.
        """
        module = self.instance.module
        self.instance.weights.publish()
        try:
            with at_rest(module, training=self._training):
                return self._objective(inputs)
        except Exception:
            if self._training:
                raise
            self._training = True  # the loss expects the output of train mode
            return self(inputs)

    def _objective(self, inputs: Mapping[str, Tensor]) -> float:
        instance, objective = self.instance, self.instance.program.objective
        count, total, penalty = sum(len(r) for r in self.rows), 0.0, 0.0
        self.undefined = []
        for rows in self.rows:
            share = len(rows) / count if objective.reduction == "mean" else 1.0
            batch = instance.batch(rows, prepared=not inputs)
            if inputs:
                batch.values.update({n: v[rows].to(instance.device) for n, v in inputs.items()})
                batch.values.update(instance.network.run(instance.network.prologue, batch.values))
            states, values = instance.forward(batch)
            value = float(instance.loss(instance.output(values), batch.target))
            total += share * value
            self.undefined += [rows] if math.isnan(value) else []
            for term in objective.regularisers:
                if term.on == "states":
                    size = share / len(rows) if objective.reduction == "mean" else share
                    total += term.weight * size * sum(float(kkt.size(t, term.kind)) for t in states)
        for term in objective.regularisers:
            if term.on == "weights":
                penalty += term.weight * sum(float(kkt.size(t, term.kind)) for t in instance.weights.trainable)
        return total + penalty


def probe_rows(examples: int, batch_size: int, sizes: Sizes | None = None) -> tuple[Tensor, ...]:
    """Evenly spread rows of the data, in batches of allowed sizes, each of which is spread over the data, too."""
    sizes = sizes or Sizes()
    count = sizes.near(min(examples, max(FEWEST, min(batch_size, MOST))), examples)
    size = sizes.portion(count, batch_size)
    spread = torch.linspace(0, examples - 1, count, dtype=torch.float64).round().long()
    batches = -(-count // size)
    return torch.cat([spread[k::batches] for k in range(batches)]).split(size)


@contextmanager
def at_rest(module: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Set a mode and fixed random numbers, without gradients; everything is put back afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        with torch.no_grad(), quiet(module):
            torch.manual_seed(0)
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def evaluated(module: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Evaluate a module, in eval mode; everything is put back, so that the run does not notice.

    Raises:
        SpecError: the evaluation does not return a mapping of names to numbers.
    """
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with at_rest(module):
        found: object = evaluate(module)
    changed = [
        n for n, p in module.named_parameters() if p.dtype != before[n].dtype or not torch.equal(p.detach(), before[n])
    ]
    if changed:
        for name in changed:
            module.get_parameter(name).data = before[name]
        warnings.warn(
            f"evaluate changed the weight '{changed[0]}' ({len(changed)} of {len(before)} weights), which were put "
            "back: let it change a copy of the module",
            stacklevel=2,
        )
    if not isinstance(found, Mapping):
        raise SpecError(f"evaluate must return a mapping such as {{'accuracy': 0.98}}, got {type(found).__name__}")
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"evaluate must return one number for each name: {error}") from error


def judged(score: float, tensors: Iterable[Tensor]) -> float:
    """A score as `Best` reads it: NaN where a tensor is not finite, infinite where the score is not."""
    if not finite(tensors):
        return math.nan
    return score if math.isfinite(score) else math.inf


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite: by their sums, which read each once, and one by one where a sum overflows."""
    known = [torch.view_as_real(t) if t.is_complex() else t for t in tensors if t.numel()]
    floating = [t.detach() for t in known if t.is_floating_point()]
    sums = [torch.isfinite(t.sum(dtype=torch.float64 if t.element_size() == 8 else torch.float32)) for t in floating]
    if not sums or bool(torch.stack(sums).all()):
        return True
    return all(bool(torch.isfinite(t).all()) for t in floating)
