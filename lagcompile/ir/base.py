"""The one pydantic base of every record in lagcompile, and the error classes.

In: nothing. Out: `Frozen`, from which every option, policy, method and program record derives, `Measured` for results,
and the exceptions that users may catch. Invariant: a `Frozen` is immutable, rejects unknown keys and compares by value;
a wrong value is a `SpecError`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

NAME = r"^[A-Za-z0-9][\w.-]{0,99}$"
"""Pattern of a name that a folder may have too."""
LARGEST_INTEGER, LARGEST_NUMBER = 2**63 - 1, 3.4e38
"""Largest values that the integers and single-precision numbers of tensors can hold."""


class Frozen(BaseModel):
    """Immutable record with documented fields; unknown keys are errors, and so are numbers that no tensor holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    FILE: ClassVar[tuple[str, ...]] = ()
    """What a file of this class is called, followed by keys that every such file has."""
    BOUNDED: ClassVar[bool] = True
    """Whether numbers must fit into a tensor."""

    if not TYPE_CHECKING:

        def __init__(self, /, **values: Any) -> None:
            """Check the values.

            Raises:
                SpecError: each thing that is wrong with them.
            """
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise SpecError(_problems(error, type(self), values)) from None

        # Nested records are checked by pydantic itself, so that all problems of a file come at once.
        __init__.__pydantic_base_init__ = True

    @field_validator("*")
    @classmethod
    def _fits_a_tensor(cls, value: object) -> object:
        if cls.BOUNDED:
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and abs(number) > LARGEST_INTEGER:
                    raise ValueError("expected an integer of at most 64 bits")
                if isinstance(number, float) and LARGEST_NUMBER < abs(number) < math.inf:
                    raise ValueError(f"expected a number of at most {LARGEST_NUMBER:g} in size, got {number:g}")
        return value


class Measured(Frozen):
    """Immutable record of results: any number is valid, NaN and infinities included."""

    model_config = ConfigDict(allow_inf_nan=True)
    BOUNDED: ClassVar[bool] = False


def printable(text: str) -> str:
    """Return a text with control characters, which a terminal would obey, escaped as Python does."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class LagcompileError(Exception):
    """Base of every error that lagcompile raises on purpose.

    Attributes:
        problems: one sentence for each thing that is wrong; all of them are reported at once.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        listed = map(printable, (problems,) if isinstance(problems, str) else tuple(problems))
        # A file may hold a word of megabytes where a name is expected; nobody reads a line that repeats it.
        self.problems: tuple[str, ...] = tuple(p if len(p) <= 2000 else f"{p[:1500]} ... {p[-300:]}" for p in listed)
        super().__init__("\n".join(self.problems))


class LiftError(LagcompileError):
    """The model cannot be captured: each problem names a module path and a source line."""


class SplitError(LagcompileError):
    """A split policy asks for breakpoints that the graph does not have.

    Attributes:
        most: the largest number of stages that the model can be cut into, where more were asked for.
        why: what stands in the way of more.
    """

    def __init__(self, problems: str | Sequence[str], most: int | None = None) -> None:
        self.most = most
        self.why = ""
        super().__init__(problems)


class ProgramError(LagcompileError):
    """A program is inconsistent, or needs something that a backend does not support."""


class BindError(LagcompileError):
    """Data, shapes or devices do not fit the program."""


class SpecError(LagcompileError):
    """A YAML file or an option is wrong: each problem names the key, in a file also the line."""


class DataError(LagcompileError):
    """A data set is missing, empty or damaged."""


class MissingExtraError(LagcompileError):
    """An optional library is not installed: the message holds the command that installs it."""


def _problems(error: ValidationError, record: type[BaseModel], values: dict[str, Any]) -> list[str]:
    from lagcompile.ir.schemaerrors import explain, show_path

    found = explain(error, record, values)
    return [": ".join(filter(None, (record.__name__, show_path(path), message))) for path, message in found]
