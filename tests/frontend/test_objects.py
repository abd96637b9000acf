"""Outputs that hold objects: caches, settings, distributions come back as what the model returns, or are named."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

import lagcompile as lc
from tests.frontend.sameness import right_or_refused

X = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)
Y = torch.linspace(0.0, 1.0, 4)


class Layer:
    """Keys and values of one layer, as a transformer's cache keeps them."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.offset: Tensor | None = None
        self.length, self.filled = 0, False

    def update(self, keys: Tensor) -> Tensor:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)
        self.dtype, self.length, self.filled = keys.dtype, self.length + keys.shape[1], True
        return self.keys


class Cache:
    def __init__(self, count: int) -> None:
        self.layers = [Layer() for _ in range(count)]
        self.spare: tuple[None, dict[str, None]] = (None, {"mask": None})

    def __len__(self) -> int:
        return len(self.layers)


class Cached(nn.Module):
    """Returns what it computed and what it keeps for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, use_cache: bool = True) -> dict[str, Any]:
        cache = Cache(len(self.layers)) if use_cache else None
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if cache is not None:
                x = cache.layers[i].update(x)
        return {"logits": self.head(x), "loss": None, "past": cache}


class Settings:
    """Holds no tensor, and is another object at each call."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Settings]:
        return self.b(torch.relu(self.a(x))), Settings(0.5)


class Pair(NamedTuple):
    logits: Tensor
    number: int = 3


class Halved(Pair):
    """A named tuple that can do more."""

    @property
    def half(self) -> Tensor:
        return self.logits / 2


class Record(dict[str, Any]):
    """Items are attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Various(Configured):
    """Containers whose classes are made in other ways than from what they hold."""

    def forward(self, x: Tensor) -> Any:
        y, _ = super().forward(x)
        gathered = defaultdict(list)
        gathered["all"].append(y)
        return Halved(y), gathered, Record(logits=y, none=None), range(2), {"a"}


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Hidden(Configured):
    def forward(self, x: Tensor) -> Slotted:  # type: ignore[override]
        return Slotted(self.b(torch.relu(self.a(x))))


class Linked:
    def __init__(self, value: Tensor) -> None:
        self.value, self.first = value, self


class Circular(Configured):
    def forward(self, x: Tensor) -> Linked:  # type: ignore[override]
        return Linked(self.b(torch.relu(self.a(x))))


class Mixture(nn.Module):
    """A mixture density network: the loss is its negative log-likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.weight, self.mean, self.scale = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> MixtureSameFamily:
        h = self.hidden(x)
        parts = Normal(self.mean(h), functional.softplus(self.scale(h)))
        return MixtureSameFamily(Categorical(logits=self.weight(h)), parts)


class Flow(nn.Module):
    """The density of what a layer makes of its input, under a fixed prior."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("zero", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(torch.tanh(self.a(x)))
        return Independent(Normal(self.zero, self.zero + 1), 1).log_prob(z)


class Policy(NamedTuple):
    log_prob: Tensor
    entropy: Tensor
    value: Tensor


class Actor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.value = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 1)
        self.log_scale = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Policy:
        h = torch.tanh(self.body(x))
        policy = Normal(self.mean(h), self.log_scale.exp())
        return Policy(policy.log_prob(x).sum(-1), policy.entropy().sum(-1), self.value(h).squeeze(-1))


def _first(output: Any, target: Tensor) -> Tensor:
    value = output["logits"] if isinstance(output, dict) else output[0]
    return functional.mse_loss(value.flatten(1).mean(1), target)


def _likelihood(output: Any, target: Tensor) -> Tensor:
    return -(output if isinstance(output, Tensor) else output.log_prob(target)).mean()


@pytest.mark.parametrize("kind", [Cached, Configured, Mixture, Flow, Actor])
def test_what_holds_objects_is_the_model(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = X[:, None].repeat(1, 3, 1) if kind is Cached else X
    assert right_or_refused(kind(), x, split=2, sizes=(1, 3), tolerance=1e-3) == ""


@pytest.mark.parametrize(
    ("kind", "loss"), [(Cached, _first), (Configured, _first), (Mixture, _likelihood), (Flow, _likelihood)]
)
def test_what_holds_objects_is_solved_and_certified(kind: type[nn.Module], loss: Any) -> None:
    torch.manual_seed(0)
    x = X[:, None].repeat(1, 3, 1) if kind is Cached else X
    lifted = lc.lift(kind(), x, split=2)
    assert lifted.verify(x, Y, loss=loss).ok
    solution = lifted.solve((x, Y), loss=loss, options=lc.RunOptions(steps=3))
    assert solution.certificate is not None
    assert solution.certificate.ok


def test_containers_of_any_class_come_back() -> None:
    pair, gathered, record, *rest = lc.lift(model := Various(), X, split=2)(X)
    assert type(pair) is Halved
    assert torch.allclose(pair.half, model(X)[0].half)
    assert torch.equal(gathered["all"][0], record.logits)
    assert rest == [range(2), {"a"}]


def test_a_cache_comes_back_as_the_model_gives_it() -> None:
    x = torch.randn(4, 3, 6)
    model = Cached()
    lifted = lc.lift(model, x, split=3)
    expected, got = model(x)["past"], lifted(x)["past"]
    assert type(got) is Cache
    assert len(got) == 3
    for ours, theirs in zip(expected.layers, got.layers, strict=True):
        assert theirs.keys is not None
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-6)
        assert (theirs.offset, theirs.length, theirs.filled, theirs.dtype) == (None, 3, True, torch.float32)
    assert lc.lift(model, (x, False), split=3)(x, False)["past"] is None


@pytest.mark.parametrize(("kind", "name"), [(Hidden, "Slotted"), (Circular, "Linked")])
def test_what_cannot_be_taken_apart_is_named(kind: type[nn.Module], name: str) -> None:
    with pytest.raises(lc.LiftError, match=f"the model returns an object of class {name}"):
        lc.lift(kind(), X, split=2)


def test_distributions_are_checked_elsewhere_while_one_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.export puts it off for the whole process
    seen: list[bool] = []

    class Asks(Flow):
        def forward(self, x: Tensor) -> Tensor:
            other = threading.Thread(target=lambda: seen.append(_refuses()))
            other.start()
            other.join()
            return super().forward(x)

    def _refuses() -> bool:
        try:
            Normal(torch.zeros(1), -torch.ones(1))
        except ValueError:
            return True
        return False

    lc.lift(Asks(), X, split=2)
    assert seen
    assert all(seen)
    assert _refuses()
