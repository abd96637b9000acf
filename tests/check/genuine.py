"""One lifted network with its certificate, for those who forge it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.check.certificate import Certificate

X = torch.randn(10, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (10,), generator=torch.Generator().manual_seed(2))
SPLIT = 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        output: Tensor = self.head(torch.tanh(self.second(h)))
        return output


def lifted(model: nn.Module | None = None, split: Any = SPLIT) -> lc.Lifted:
    return lc.lift(model or Net(), X, split=split)


@cache
def genuine() -> lc.Certificate:
    return lifted().verify(X, Y, loss=F.cross_entropy)


def said(certificate: lc.Certificate) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(certificate.model_dump_json())
    return found


def sealed(data: dict[str, Any]) -> lc.Certificate:
    """A forger's certificate: any content, with the digest that belongs to it."""
    made = Certificate.model_validate_json(json.dumps(data))
    return made.model_copy(update={"digest": made.own_digest()})
