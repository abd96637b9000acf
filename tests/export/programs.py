"""Programs whose LaTeX was looked at; `python -m tests.export.programs` writes the golden files anew."""

from __future__ import annotations

from pathlib import Path

import torch

import lagcompile as lc
from lagcompile.export.latex import latex
from lagcompile.ir.base import Frozen
from lagcompile.workbench.spec import load
from tests.golden.programs import SPECS
from tests.golden.programs import program as spec_program
from tests.nets import Normalised, Residual, deep

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("digits_distprop", "digits_altmin", "digits_local_propagation", "residual", "deep", "mixed", "normalised")


def program(name: str) -> tuple[lc.Program, Frozen]:
    """A program and a method for it."""
    if name.startswith("digits"):
        return spec_program(name), load(SPECS / f"{name}.yaml").spec.method
    x = torch.randn(4, 5)
    if name == "residual":
        return lc.lift(Residual(), (torch.randn(4, 6),), split=3).program, lc.Extragradient()
    if name == "deep":
        formulation = lc.Formulation(
            weight=lc.GeometricWeight(start=1, factor=1.5, every=100),
            domain=lc.OfActivation(),
            regularisers=(
                lc.Regulariser(kind="l2", on="weights", weight=1e-4),
                lc.Regulariser(kind="l1", on="states", weight=1e-3),
            ),
        )
        return lc.lift(deep(16), (x,), split=16, formulation=formulation).program, lc.ExtragradientFromPast()
    if name == "normalised":
        formulation = lc.Formulation(transform=lc.Softshrink(epsilon=0.01), weight=lc.AugmentedWeight(value=0.5))
        lifted = lc.lift(Normalised(), (torch.randn(4, 1, 4, 4),), split=2, formulation=formulation)
        return lifted.program, lc.AugmentedLagrangian()
    states = lc.StateFormulation
    formulation = lc.Formulation(
        inputs={"input_1": lc.InputFormulation(lower=-1, upper=1)},
        frozen=("0.*",),
        at={
            "1": states(storage=lc.Eliminated()),
            "3": states(transform=lc.NormTube(epsilon=0.1), multiplier=lc.MultiplierOptions(layout="example")),
            "5": states(transform=lc.AbsTube(epsilon=1e-3), multiplier=lc.MultiplierOptions(layout="scalar")),
        },
        constraints=(
            lc.ValueConstraint(name="box", reads=("h4",), lower=-1, upper=2),
            lc.ValueConstraint(name="my_rule", reads=("h3", "2.weight"), function="laws:energy", relation="=="),
        ),
    )
    return lc.lift(deep(5), (x,), split=5, formulation=formulation).program, lc.DescentAscent()


def main() -> None:
    """Write every golden file; compile one and look at it before committing it."""
    GOLDEN.mkdir(exist_ok=True)
    for name in NAMES:
        (GOLDEN / f"{name}.tex").write_text(latex(*program(name)))


if __name__ == "__main__":
    main()
