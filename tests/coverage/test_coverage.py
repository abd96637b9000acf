"""The coverage table: what a row says, what is kept, and how small members and inputs are chosen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from tests import coverage
from tests.coverage import subjects
from tests.coverage.subjects import Built, Subject
from tests.nets import deep


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(5)
        return x


class Windows(nn.Module):
    """Takes images of 64 or more, or of the size that it was made for."""

    def __init__(self, image_size: int = 224) -> None:
        super().__init__()
        self.size, self.layer = image_size, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size or self.size < 64:
            raise ValueError("wrong size")
        return self.layer(x.mean((2, 3)))


def good() -> Built:
    return deep(5), (torch.randn(3, 5),), {}


def short() -> Built:
    return nn.Linear(5, 2), (torch.randn(3, 5),), {}


def slow() -> Built:
    return Slow(), (torch.randn(3, 5),), {}


FAMILY: Mapping[str, Subject] = {"good": good, "short": short}


def test_a_row_is_what_was_measured() -> None:
    row = coverage.measure("own", "good", good)
    assert row.ok
    assert (row.model, row.stages, row.states, row.difference, row.batch) == ("Sequential", 4, 3, 0.0, "dynamic")
    assert row.certificate is not None
    assert row.certificate < 1e-12
    failed = coverage.measure("own", "short", short)
    assert not failed.ok
    assert failed.parameters == 12
    assert failed.error.startswith("SplitError: split into 4 stages: the graph allows at most 1")
    late = coverage.measure("own", "slow", slow, seconds=1)
    assert late.error == "TimeoutError: not finished after 1 seconds"


def test_a_run_is_resumed_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def family(name: str) -> Mapping[str, Subject]:
        def noted(key: str) -> Subject:
            def build() -> Built:
                built.append(key)
                return FAMILY[key]()

            return build

        return {key: noted(key) for key in FAMILY}

    monkeypatch.setattr(coverage, "subjects_of", family)
    first = coverage.run("own", folder=tmp_path)
    again = coverage.run("own", folder=tmp_path)
    assert built == ["good", "short", "short"]  # a failure is tried again
    assert [r.ok for r in first] == [r.ok for r in again] == [True, False]
    text = (tmp_path / "own.md").read_text()
    assert "1 of 2 models lift, equal the original in eval and pass the float64 certificate at 4 stages." in text
    assert "| short | 12 |" in text


def test_the_smallest_input_that_a_model_takes() -> None:
    model, (x,), _ = subjects._smallest(Windows, "image_size", (3, 224))
    assert isinstance(model, Windows)
    assert model.size == x.shape[-1] == 64
    _, (x,), _ = subjects._smallest(Windows, "", (3, 224))
    assert x.shape[-1] == 224


def test_the_member_of_a_family_that_sounds_small() -> None:
    assert subjects._small(["net_large", "net_tiny", "net_base"]) == "net_tiny"
    assert subjects._small(["net152", "net50d", "net50"]) == "net50"
    assert subjects._small(["net_l", "net_s"]) == "net_s"


def test_unknown_families() -> None:
    with pytest.raises(lc.SpecError, match="no family 'other': there are torchvision, timm, transformers"):
        subjects.subjects_of("other")
