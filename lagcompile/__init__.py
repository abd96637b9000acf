"""lagcompile: compile a PyTorch network into a constrained program and solve it.

import lagcompile as lc
lifted = lc.lift(model, example_inputs=(x,), split=4)
print(lifted.program)
solution = lifted.solve((x, y), loss=torch.nn.functional.cross_entropy, method=lc.Extragradient())
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import lagcompile.early  # noqa: F401  (before what imports torch)
from lagcompile.backends.alternating import AltMin
from lagcompile.backends.augmented import AugmentedLagrangian
from lagcompile.backends.base import Executor, RunOptions, drive
from lagcompile.backends.baselines import Backprop, DifferenceTargetPropagation, FeedbackAlignment
from lagcompile.backends.first_order import DescentAscent, Extragradient, ExtragradientFromPast, OptimisticGradient
from lagcompile.backends.method import Method
from lagcompile.backends.proximal import ConjugateGradients, Exact, ProxProp
from lagcompile.check.certificate import Certificate
from lagcompile.frontend.conditioning import ConditioningSplit
from lagcompile.frontend.lower import Formulation, InputFormulation, StateFormulation
from lagcompile.frontend.memory import MemorySplit
from lagcompile.frontend.repeats import IsomorphicSplit
from lagcompile.frontend.split import AtSplit, AutoSplit, BalancedSplit, EverySplit, NoSplit
from lagcompile.ir.axes import (
    AugmentedWeight,
    ConstantWeight,
    Forward,
    GeometricWeight,
    LinearWeight,
    MultiplierOptions,
    UnitSphere,
    Zeros,
)
from lagcompile.ir.base import (
    BindError,
    DataError,
    LagcompileError,
    LiftError,
    MissingExtraError,
    ProgramError,
    SpecError,
    SplitError,
)
from lagcompile.ir.domains import Free, NonNegative, OfActivation, Range
from lagcompile.ir.program import Program, Regulariser, ValueConstraint
from lagcompile.ir.solution import History, Solution, Status
from lagcompile.ir.storages import ClassGaussian, Eliminated, Table, Transient
from lagcompile.ir.transforms import Abs, AbsTube, Hardshrink, Identity, NormTube, Softshrink, Squared
from lagcompile.lift import Lifted, lift
from lagcompile.runtime.rules import SGD, Adagrad, Adam
from lagcompile.runtime.steps import Extra

if TYPE_CHECKING:
    from lagcompile.backends.convex import Convex
    from lagcompile.backends.mip import MixedInteger
    from lagcompile.backends.sqp import SQP
    from lagcompile.saved import load, load_solution

_LATE = {
    "SQP": "backends.sqp",
    "Convex": "backends.convex",
    "MixedInteger": "backends.mip",
    "load": "saved",
    "load_solution": "saved",
}


def __getattr__(name: str) -> Any:
    """The exact backends, which bring SciPy and CVXPY, and the reading of folders are imported on first use."""
    if name in _LATE:
        return getattr(import_module(f"lagcompile.{_LATE[name]}"), name)
    raise AttributeError(f"module 'lagcompile' has no attribute '{name}'")


__all__ = [
    "SGD",
    "SQP",
    "Abs",
    "AbsTube",
    "Adagrad",
    "Adam",
    "AltMin",
    "AtSplit",
    "AugmentedLagrangian",
    "AugmentedWeight",
    "AutoSplit",
    "Backprop",
    "BalancedSplit",
    "BindError",
    "Certificate",
    "ClassGaussian",
    "ConditioningSplit",
    "ConjugateGradients",
    "ConstantWeight",
    "Convex",
    "DataError",
    "DescentAscent",
    "DifferenceTargetPropagation",
    "Eliminated",
    "EverySplit",
    "Exact",
    "Executor",
    "Extra",
    "Extragradient",
    "ExtragradientFromPast",
    "FeedbackAlignment",
    "Formulation",
    "Forward",
    "Free",
    "GeometricWeight",
    "Hardshrink",
    "History",
    "Identity",
    "InputFormulation",
    "IsomorphicSplit",
    "LagcompileError",
    "LiftError",
    "Lifted",
    "LinearWeight",
    "MemorySplit",
    "Method",
    "MissingExtraError",
    "MixedInteger",
    "MultiplierOptions",
    "NoSplit",
    "NonNegative",
    "NormTube",
    "OfActivation",
    "OptimisticGradient",
    "Program",
    "ProgramError",
    "ProxProp",
    "Range",
    "Regulariser",
    "RunOptions",
    "Softshrink",
    "Solution",
    "SpecError",
    "SplitError",
    "Squared",
    "StateFormulation",
    "Status",
    "Table",
    "Transient",
    "UnitSphere",
    "ValueConstraint",
    "Zeros",
    "drive",
    "lift",
    "load",
    "load_solution",
]
