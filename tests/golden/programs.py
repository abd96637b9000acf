"""The programs that the specs stand for, as text; `python -m tests.golden.programs` writes the golden files anew.

Shapes come from the data set's name, so that no data are read.
"""

from __future__ import annotations

from pathlib import Path

import torch

import lagcompile as lc
from lagcompile.workbench.spec import load

GOLDEN = Path(__file__).parent
SPECS = GOLDEN.parent.parent / "specs"
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
NAMES = (
    "digits_altmin",
    "digits_altmin_memory",
    "digits_altmin_sign",
    "digits_augmented_lagrangian",
    "digits_auxiliary_coordinates",
    "digits_backprop",
    "digits_dfa",
    "digits_distprop",
    "digits_distprop_scalar",
    "digits_distprop_stages",
    "digits_dtp",
    "digits_dual_sweep",
    "digits_extraprop",
    "digits_extraprop_scalar",
    "digits_gda",
    "digits_local_propagation",
    "digits_pc_alm",
    "digits_proxprop",
    "digits_proxprop_exact",
    "digits_regularized",
    "mnist_distprop",
    "mnist_extraprop",
    "mnist_extraprop_published",
)


def program(name: str) -> lc.Program:
    """The program of a spec."""
    loaded = load(SPECS / f"{name}.yaml")
    spec = loaded.spec
    torch.manual_seed(0)
    model = loaded.model(**dict(spec.model.args))
    x = torch.randn(8, *SHAPES[spec.data.name])
    lifted = lc.lift(model, (x,), split=loaded.split, formulation=spec.formulation, name=spec.name)
    whole = lifted.program
    return whole.model_copy(update={"objective": whole.objective.model_copy(update={"loss": spec.loss})})


def main() -> None:
    """Write every golden file; look at the difference before committing it."""
    for name in NAMES:
        (GOLDEN / f"{name}.txt").write_text(str(program(name)))


if __name__ == "__main__":
    main()
