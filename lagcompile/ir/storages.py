r"""Where a state lives: rows, numbers, and how it prints.

In: nothing. Out: one record for each storage and their union `Storage`. Invariant: a reader asks for a property, never
for the class; what needs tensors (rows, starts, values, defects) is said once in `runtime/storages.py`.

To add a storage: its record, its name in the union below, and its class there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from lagcompile.ir.base import Frozen

DType = Literal["float32", "float64", "bfloat16", "float16"]
Symbol = Callable[[str, str], str]
"""Symbol of a letter with the state's number, and an index above."""


class Sampling(NamedTuple):
    """How synthetic examples are drawn from a state: how many for each class, and whether anew in each step."""

    size: int
    fresh: bool


class Part(NamedTuple):
    """What is kept of a state, in TeX: a letter, its meaning, and whether it is never negative."""

    letter: str
    meaning: str
    positive: bool


class _Storage(Frozen):
    kind: str
    variable: ClassVar[bool] = True
    """The state is a variable with a constraint."""
    kept: ClassVar[bool] = True
    """Values outlive their batch."""
    per_example: ClassVar[bool] = False
    """Each example of the data set has a row of its own."""
    per_class: ClassVar[bool] = False
    """Each class has a row of its own."""
    single: ClassVar[bool] = False
    """One row serves all examples."""
    scaled: ClassVar[Literal["no", "class_sigma"]] = "no"
    """What the defect is divided by."""
    letter: ClassVar[str] = "B"
    """Number of rows in a printed type: B in a batch, N in the data set, M classes."""
    noun: ClassVar[str] = "state"
    """What a value is, in TeX."""
    whose: ClassVar[str] = ""
    """To whom a value belongs, in TeX; empty where `noun` says it."""
    parts: ClassVar[tuple[Part, ...]] = ()
    """What is kept, where that is not the value itself."""
    meaning: ClassVar[str] = ""
    """TeX sentence on what the formulas use; empty where they need none."""

    @property
    def sampling(self) -> Sampling | None:
        """How stages read the state through samples; None where they read its value."""
        return None

    @property
    def sampled(self) -> bool:
        """Whether stages read the state through samples."""
        return self.sampling is not None

    @property
    def letters(self) -> tuple[str, ...]:
        """Symbols of the variables."""
        return tuple(p.letter for p in self.parts) or ("h",)

    @property
    def text(self) -> str:
        """The storage as plain text."""
        return self.kind

    def rows(self, examples: int, batch: int, classes: int) -> int:
        """Return the rows that are held at a time, of which each has the numbers of one value or of its parts."""
        return examples

    def keeps(self, dtype: str) -> str:
        """Return the type in which rows are kept of a state that is computed in another."""
        return dtype

    def defect_text(self, prediction: str, state: str) -> str:
        """Return the defect as plain text."""
        return f"{prediction} - {state}"

    def defect_tex(self, prediction: str, value: str, symbol: Symbol, index: str) -> str:
        """Return the defect as TeX; the index is that of the row's class."""
        return f"{prediction} - {value}"

    def value_tex(self, value: str, symbol: Symbol) -> str:
        """Return, as TeX, how the value follows from what is kept; empty where that is the value."""
        return ""


class Eliminated(_Storage):
    """No variable: the stage's output is used as it is (single shooting across this breakpoint)."""

    variable = False
    kept = False
    noun = "value"
    whose = "not a variable"
    kind: Literal["eliminated"] = "eliminated"

    def rows(self, examples: int, batch: int, classes: int) -> int:
        """Return none."""
        return 0


class Transient(_Storage):
    """A variable that exists for one batch and is started anew in the next."""

    kept = False
    whose = "kept for one batch"
    kind: Literal["transient"] = "transient"

    def rows(self, examples: int, batch: int, classes: int) -> int:
        """Return the rows of a batch."""
        return min(batch, examples)


class Table(_Storage):
    """A row for each example of the data set; a step touches the batch's rows only."""

    per_example = True
    letter = "N"
    whose = "one per example"
    kind: Literal["table"] = "table"
    dtype: DType | None = None
    """Storage type of the rows; None keeps the state's own."""

    @property
    def text(self) -> str:
        """The storage with the type of its rows."""
        return f"table({self.dtype})" if self.dtype else "table"

    def keeps(self, dtype: str) -> str:
        """Return the type of the rows."""
        return self.dtype or dtype


class ClassGaussian(_Storage):
    """A Gaussian for each class: mean mu(y), standard deviation softplus(.), read through samples (DistProp)."""

    per_class = True
    scaled = "class_sigma"
    letter = "M"
    noun = "sample $n$ of class $c$"
    parts = (Part(r"\mu", "mean", False), Part(r"\sigma", "standard deviation", True))
    meaning = r"$\sigma = \log(1 + e^{\tilde{\sigma}})$"
    kind: Literal["class_gaussian"] = "class_gaussian"
    samples: int = Field(default=32, ge=1)
    """Synthetic examples drawn for each class (N)."""
    noise: Literal["fixed", "fresh"] = "fixed"
    """One draw for the whole run (a well-defined program) or a new one each step; shared by both half steps."""
    sigma: float = Field(default=1.0, gt=0)
    """Standard deviation at the start."""

    @property
    def sampling(self) -> Sampling:
        """Draw so many samples, with one noise or a new one each step."""
        return Sampling(self.samples, self.noise == "fresh")

    @property
    def text(self) -> str:
        """The storage with its samples and noise."""
        return f"class_gaussian({self.samples} samples, {self.noise} noise)"

    def rows(self, examples: int, batch: int, classes: int) -> int:
        """Return one for each class."""
        return classes

    def defect_text(self, prediction: str, state: str) -> str:
        """Return the z-score."""
        return f"({prediction} - mu({state})) / sigma({state})"

    def defect_tex(self, prediction: str, value: str, symbol: Symbol, index: str) -> str:
        """Return the z-score as TeX."""
        mu, sigma = symbol(r"\mu", index), symbol(r"\sigma", index)
        return rf"\bigl({prediction} - {mu}\bigr) / {sigma}"

    def value_tex(self, value: str, symbol: Symbol) -> str:
        """Return a sample: the mean, and noise times the standard deviation."""
        mu, sigma, noise = symbol(r"\mu", "(c)"), symbol(r"\sigma", "(c)"), symbol(r"\varepsilon", "(c,n)")
        return rf"{value} = {mu} + {sigma} \odot {noise}, \qquad {noise} \sim \mathcal{{N}}(0, I)"


class Shared(_Storage):
    """One value for all examples (a tensor without a batch axis)."""

    single = True
    whose = "one for all examples"
    kind: Literal["shared"] = "shared"

    def rows(self, examples: int, batch: int, classes: int) -> int:
        """Return one."""
        return 1


Storage = Annotated[Eliminated | Transient | Table | ClassGaussian | Shared, Field(discriminator="kind")]
