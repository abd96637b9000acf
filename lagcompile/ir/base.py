"""The one pydantic base of every record in lagcompile, and the error classes.

In: nothing. Out: `Frozen`, from which every option, policy, method and program record derives, and the exceptions
that users may catch. Invariant: a `Frozen` is immutable, rejects unknown keys and compares by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

NAME = r"^[A-Za-z0-9][\w.-]{0,99}$"
"""Pattern of a name that is also the name of a folder."""


class Frozen(BaseModel):
    """Immutable record with documented fields; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, use_attribute_docstrings=True)
    FILE: ClassVar[tuple[str, ...]] = ()
    """What a file of this class is called, and keys that each of them has."""


class LagcompileError(Exception):
    """Base of every error that lagcompile raises on purpose.

    Attributes:
        problems: one sentence for each thing that is wrong; all of them are reported at once.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class LiftError(LagcompileError):
    """The model cannot be captured: each problem names a module path and a source line."""


class SplitError(LagcompileError):
    """A split policy asks for breakpoints that the graph does not have."""


class ProgramError(LagcompileError):
    """A program is inconsistent, or asks for what a backend does not execute."""


class BindError(LagcompileError):
    """Data, shapes or devices do not fit the program."""


class SpecError(LagcompileError):
    """A YAML file is wrong: each problem names the file, the line and the key."""


class DataError(LagcompileError):
    """A data set is missing, empty or damaged."""


class MissingExtraError(LagcompileError):
    """An optional library is not installed: the message holds the command that installs it."""
