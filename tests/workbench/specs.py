"""Small specs for the tests of the workbench."""

from __future__ import annotations

from pathlib import Path

MOONS = """\
lagcompile: 1
name: moons
model: {name: mlp, args: {widths: [2, 8, 8, 2], activation: tanh}}
data: {name: two_moons, args: {train: 64, test: 32}}
split: {policy: at, after: [layers.2, layers.4]}
formulation:
  weight: {kind: constant, value: 1.0}
method:
  kind: extragradient
  weights: {kind: adam, lr: 0.01}
  states: {kind: adagrad, lr: 0.1}
  multipliers: {kind: sgd, lr: 0.3}
run: {steps: 30, batch_size: 16, look_every: 5, checkpoint_every: 10}
"""


def moons(folder: Path) -> Path:
    """The two-moons spec as a file."""
    path = folder / "moons.yaml"
    path.write_text(MOONS)
    return path


def replaced(folder: Path, old: str, new: str) -> Path:
    """The two-moons spec as a file with one text replaced (the text must be there)."""
    assert old in MOONS
    path = folder / "moons.yaml"
    path.write_text(MOONS.replace(old, new))
    return path
