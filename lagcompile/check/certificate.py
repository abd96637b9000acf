"""The certificate: residuals by the user's names, with tolerances, as a file that can be checked again.

In: residuals that `verify` or a backend's check measured. Out: `Certificate`, JSON. Invariant: `ok` says nothing but
that every residual is within its tolerance; residuals are unscaled or relative as their kind says.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lagcompile.ir.base import Frozen
from lagcompile.ir.jsonfile import validate

Kind = Literal[
    "forward",
    "defect",
    "adjoint",
    "state stationarity",
    "weight gradient",
    "weight stationarity",
    "primal feasibility",
    "dual feasibility",
    "complementarity",
    "global bound",
]


class Residual(Frozen):
    """One number that should be zero."""

    kind: Kind
    name: str
    """Module path, state or parameter, in the user's names."""
    mode: str
    """train or eval."""
    value: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Within its tolerance (a NaN is not)."""
        return self.value <= self.tolerance


class Certificate(Frozen):
    """Residuals of a lifted model or of a solution."""

    format: Literal[1] = 1
    model: str
    program: str
    """Digest of the program's JSON."""
    inputs: str
    """Digest of the inputs and targets that were used."""
    dtype: str
    seed: int
    residuals: tuple[Residual, ...]
    facts: tuple[str, ...] = ()
    """What was shown beyond residuals, in sentences."""
    unassessed: tuple[str, ...] = ()
    """What could not be decided, and why; only a global bound makes up for it."""
    versions: Mapping[str, str] = Field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every residual is within its tolerance, and what was not assessed is covered by a global bound."""
        bounded = any(r.kind == "global bound" for r in self.residuals)
        return all(r.ok for r in self.residuals) and (bounded or not self.unassessed)

    @property
    def worst(self) -> Residual | None:
        """The residual that is largest against its tolerance."""
        return max(self.residuals, key=lambda r: r.value / max(r.tolerance, 1e-300), default=None)

    def save(self, path: str | Path) -> Path:
        """Write the certificate as JSON."""
        target = Path(path)
        target.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate.

        Raises:
            DataError: there is no such file, or it is no certificate; each problem names a line and a key.
        """
        return validate(path, cls)

    def __str__(self) -> str:
        lines = [f"certificate for {self.model} in {self.dtype}: {'ok' if self.ok else 'NOT ok'}"]
        for mode in dict.fromkeys(r.mode for r in self.residuals):
            for kind in dict.fromkeys(r.kind for r in self.residuals if r.mode == mode):
                group = [r for r in self.residuals if r.kind == kind and r.mode == mode]
                worst = max(group, key=lambda r: r.value)
                mark = "ok" if all(r.ok for r in group) else "FAILS"
                lines.append(
                    f"  {mode:5}  {kind:19} {len(group):4} checked, worst {worst.value:.1e} "
                    f"(at most {worst.tolerance:.0e}) {mark}: {worst.name}"
                )
        lines += [f"  NOT assessed: {u}" for u in self.unassessed]
        return "\n".join([*lines, *(f"  {f}" for f in self.facts)])


def versions() -> dict[str, str]:
    """Versions that a certificate was made with."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("lagcompile")
    except PackageNotFoundError:
        own = "unknown"
    return {"lagcompile": own, "torch": torch.__version__, "python": platform.python_version()}


def digest(values: Sequence[Any]) -> str:
    """Short digest of tensors and texts."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous()
            if array.dtype == torch.bfloat16:
                array = array.float()
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(array.numpy().tobytes())
        else:
            found.update(str(value).encode())
    return found.hexdigest()[:16]
