"""Step rules: SGD, Adagrad, Adam, and the schemes that combine gradients.

In: gradients and slots. Out: moved values. Invariant: a rule's arithmetic is written once (`move`), in place, for dense
tensors and rows of tables alike; every rule is odd in its gradients, so that a negative lr climbs.

To add a rule: its class, and its name in the union at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam

from lagcompile.ir.base import Frozen
from lagcompile.ir.tex import number

Tensors = list[Tensor]
Slots = dict[str, Tensors]
Beta = Annotated[float, Field(gt=0, lt=1)]


class _Rule(Frozen, ABC):
    """Base of all rules."""

    kind: str
    lr: float = Field(ge=0)
    """Step size."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Every move first takes the share lr * weight_decay, at most 1, off all values that the rule moves (decoupled from
    the gradient: Loshchilov and Hutter 2019, AdamW); a schedule of lr scales the share too. It is not part of the
    program that certificates are about; regularisers are. bfloat16 has no values a share below 0.002 smaller."""

    @model_validator(mode="after")
    def _share(self) -> _Rule:
        if self.lr * self.weight_decay > 1:
            raise ValueError(
                f"lr * weight_decay = {self.lr * self.weight_decay:g}: a move would turn the sign of what it shrinks; "
                f"weight_decay is at most 1/lr = {1 / self.lr:g}"
            )
        return self

    def slots(self) -> tuple[str, ...]:
        """Names of the memory that has a number for each value."""
        return ()

    def counts(self) -> tuple[str, ...]:
        """Names of the memory that has one number for a dense tensor, and one for each row of a table."""
        return ()

    def initial(self, slot: str) -> float:
        """Return the starting value of a slot."""
        return 0.0

    @abstractmethod
    def move(self, values: Tensors, gradients: Tensors, slots: Slots, lr: float) -> None:
        """Move values in place along their gradients; slots and counts advance in place."""

    @abstractmethod
    def tex(self) -> str:
        """Return the rule in words, its numbers as TeX."""

    def _rate(self, *more: str) -> str:
        decay = [f"weight decay ${number(self.weight_decay)}$"] if self.weight_decay else []
        return ", ".join((f"step ${number(self.lr)}$", *decay, *more))

    def shrink(self, values: Tensors, lr: float) -> None:
        """Take the decay's share off the values, in place."""
        if self.weight_decay:
            torch._foreach_mul_(values, 1 - abs(lr) * self.weight_decay)


class SGD(_Rule):
    """x - lr g, with heavy-ball or Nesterov momentum where it is not 0."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Share of the velocity that is kept from one step to the next."""
    nesterov: bool = False
    """Step along g + momentum * velocity instead of the velocity."""

    def slots(self) -> tuple[str, ...]:
        """Return the velocity, where there is momentum."""
        return ("velocity",) if self.momentum else ()

    def move(self, values: Tensors, gradients: Tensors, slots: Slots, lr: float) -> None:
        """Move values in place; see `_Rule.move`."""
        self.shrink(values, lr)
        if self.momentum:
            torch._foreach_mul_(slots["velocity"], self.momentum)
            torch._foreach_add_(slots["velocity"], gradients)
            if self.nesterov:
                gradients = list(torch._foreach_add(gradients, slots["velocity"], alpha=self.momentum))
            else:
                gradients = slots["velocity"]
        torch._foreach_add_(values, gradients, alpha=-lr)

    def tex(self) -> str:
        """Return the rule in words."""
        if not self.momentum:
            return f"gradient ({self._rate()})"
        momentum = f"momentum ${number(self.momentum)}$"
        name = "Nesterov's gradient" if self.nesterov else "gradient"
        return f"{name} ({self._rate(momentum)})"


class Adagrad(_Rule):
    """x - lr g / (sqrt(sum of g^2) + epsilon) (Duchi et al. 2011)."""

    kind: Literal["adagrad"] = "adagrad"
    epsilon: float = Field(default=1e-10, gt=0)
    """Added to the root of the accumulators."""
    start: float = Field(default=0.0, ge=0)
    """Starting value of the accumulators."""

    def slots(self) -> tuple[str, ...]:
        """Return the sum of squares."""
        return ("sum",)

    def initial(self, slot: str) -> float:
        """Return the starting value of a slot."""
        return self.start

    def move(self, values: Tensors, gradients: Tensors, slots: Slots, lr: float) -> None:
        """Move values in place; see `_Rule.move`."""
        self.shrink(values, lr)
        fused = all(v.device.type == "cpu" for v in values)  # one pass over memory instead of four
        adagrad(
            values,
            gradients,
            slots["sum"],
            [torch.zeros(())] * len(values),  # the count matters only to a decay of lr, and there is none
            fused=fused,
            foreach=not fused,
            has_sparse_grad=False,
            lr=lr,
            weight_decay=0.0,
            lr_decay=0.0,
            eps=self.epsilon,
            maximize=False,
        )

    def tex(self) -> str:
        """Return the rule in words."""
        return f"Adagrad ({self._rate()})"


class Adam(_Rule):
    """Adam (Kingma and Ba 2015); as ExtraAdam it shares moments and count over both half steps (Gidel et al. 2019)."""

    kind: Literal["adam"] = "adam"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the means of gradients and of their squares."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""

    def slots(self) -> tuple[str, ...]:
        """Return the means of gradients and of their squares."""
        return ("mean", "square")

    def counts(self) -> tuple[str, ...]:
        """Return the number of moves."""
        return ("count",)

    def move(self, values: Tensors, gradients: Tensors, slots: Slots, lr: float) -> None:
        """Move values in place; see `_Rule.move`."""
        self.shrink(values, lr)
        first, second = self.betas
        mean, square, count = slots["mean"], slots["square"], slots["count"]
        if all(n.dim() == 0 for n in count):
            self._dense(values, gradients, slots, lr)
            return
        torch._foreach_add_(count, 1.0)
        torch._foreach_lerp_(mean, gradients, 1 - first)
        torch._foreach_mul_(square, second)
        torch._foreach_addcmul_(square, gradients, gradients, value=1 - second)
        for value, m, s, n in zip(values, mean, square, count, strict=True):
            n = n.to(value.dtype) if value.dtype == torch.float64 else n
            # 1 - beta^n, without the cancellation that a float32 count would bring
            root = (s / -torch.expm1(n * math.log(second))).sqrt_().add_(self.epsilon)
            value.addcdiv_(m / -torch.expm1(n * math.log(first)), root, value=-lr)

    def tex(self) -> str:
        """Return the rule in words."""
        first, second = map(number, self.betas)
        betas = rf"$\beta = ({first}, {second})$"
        return f"Adam ({self._rate(betas)})"

    def _dense(self, values: Tensors, gradients: Tensors, slots: Slots, lr: float) -> None:
        """Move a tensor with one count by PyTorch's fused kernel."""
        adam(
            values,
            gradients,
            slots["mean"],
            slots["square"],
            [],
            slots["count"],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=self.epsilon,
            maximize=False,
        )


Rule = SGD | Adagrad | Adam
RuleSpec = Annotated[Rule, Field(discriminator="kind")]
Scheme = Literal["extragradient", "past", "optimistic", "descent"]
"""extragradient: two gradients a step. past: extrapolate along the last gradient, one gradient a step (Popov 1980).
optimistic: step along 2 g_t - g_{t-1} (Daskalakis et al. 2018). descent: simultaneous gradient descent-ascent."""


def rules_tex(rules: Mapping[str, Rule | None]) -> str:
    """Describe step rules by the symbol that they move, in a sentence with TeX."""
    said = [f"{rule.tex()} for ${symbol}$" for symbol, rule in rules.items() if rule is not None]
    return "Step rules: " + "; ".join(said) + "."
