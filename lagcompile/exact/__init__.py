"""Exact solution of small nonlinear programs: `minimize`, its options, result and statuses."""

from lagcompile.exact.derivatives import Derivatives, FirstOrder
from lagcompile.exact.entry import minimize
from lagcompile.exact.options import Options
from lagcompile.exact.result import (
    KKT,
    Conflict,
    Facts,
    IterationRow,
    IterationTable,
    Multipliers,
    Result,
    Timings,
)
from lagcompile.exact.status import Status

__all__ = [
    "KKT",
    "Conflict",
    "Derivatives",
    "Facts",
    "FirstOrder",
    "IterationRow",
    "IterationTable",
    "Multipliers",
    "Options",
    "Result",
    "Status",
    "Timings",
    "minimize",
]
