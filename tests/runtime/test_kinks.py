"""How far arguments are from a point without a derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lagcompile.runtime.kinks import KINKS, is_norm_of_sizes

X = torch.tensor([[-2.0, 0.5, 0.25], [3.0, 3.5, -1.0]])


@pytest.mark.parametrize(
    ("name", "arguments", "distances"),
    [
        ("relu", (), [[2.0, 0.5, 0.25], [3.0, 3.5, 1.0]]),
        ("clamp", (0.0, 3.0), [[2.0, 0.5, 0.25], [0.0, 0.5, 1.0]]),
        ("clamp_max", (3.0,), [[5.0, 2.5, 2.75], [0.0, 0.5, 4.0]]),
        ("hardtanh", (), [[1.0, 0.5, 0.75], [2.0, 2.5, 0.0]]),
        ("maximum", (torch.ones(2, 3),), [[3.0, 0.5, 0.75], [2.0, 2.5, 2.0]]),
        ("softshrink", (), [[1.5, 0.0, 0.25], [2.5, 3.0, 0.5]]),
        ("softshrink", (1.0,), [[1.0, 0.5, 0.75], [2.0, 2.5, 0.0]]),
        ("hardsigmoid", (), [[1.0, 2.5, 2.75], [0.0, 0.5, 2.0]]),
        ("max", (), [0.5]),
        ("amax", ([],), [0.5]),
        ("amax", (1,), [0.25, 0.5]),
        ("amax", ([0],), [5.0, 3.0, 1.25]),
        ("amax", ([0, 1],), 0.5),
    ],
)
def test_distances(name: str, arguments: tuple[Any, ...], distances: Any) -> None:
    found = KINKS[name]((X, *arguments))
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(distances))


@pytest.mark.parametrize(
    ("name", "arguments"), [("clamp", (torch.zeros(2, 3),)), ("sort", ()), ("amax", ([],)), ("round", ())]
)
def test_distances_that_are_not_known(name: str, arguments: tuple[Any, ...]) -> None:
    x = X[:1, :1] if name == "amax" else X
    assert KINKS[name]((x, *arguments)) is None


def test_norms_with_kinks() -> None:
    for order, kink in ((1, True), (float("inf"), True), (float("-inf"), True), (2, False), (3, False)):
        assert is_norm_of_sizes("linalg_vector_norm", (X, order)) == kink
        assert not is_norm_of_sizes("linalg_matrix_norm", (X, order))
    assert not is_norm_of_sizes("linalg_vector_norm", (X,))
