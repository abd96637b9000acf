"""The certificate: residuals by the user's names, what they were measured on, as a file that can be checked again.

In: residuals that `verify` or a backend's check measured. Out: `Certificate`, JSON. Invariant: `ok` says that every
identity that the program has was measured, on something, and lies within its tolerance; what was not measured, or on
nothing that could have failed, makes it "not assessed", with the reason. A certificate that was changed is neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from lagcompile.ir.arguments import expect_positive
from lagcompile.ir.base import DataError, Measured, SpecError
from lagcompile.ir.disk import replace
from lagcompile.ir.jsonfile import validate
from lagcompile.ir.places import path_of

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
Verdict = Literal["ok", "failed", "not assessed"]
Claim = Literal["network", "solution"]
Identity = tuple[str, str, str]
"""Kind, name, mode."""

LARGEST_TOLERANCE = 1e-2
"""Tolerance above which a residual that holds says nothing."""
USUAL: Mapping[Claim, float] = {"network": 1e-10, "solution": 1e-8}
"""Tolerances where none was asked for; a verdict by a looser one says so."""
SAME_LOSS = 1e-8
"""Relative difference of the values of one loss on two machines."""
EXIT: Mapping[Verdict, int] = {"ok": 0, "failed": 1, "not assessed": 3}
"""Exit status of a command that certifies."""
MODES: Mapping[Claim, tuple[str, ...]] = {"network": ("train", "eval"), "solution": ("eval",)}
"""Modes in which a claim is measured."""
BOUND: Mapping[str, str] = {
    "model": "the model's class",
    "program": "the program",
    "stages": "what the stages compute",
    "weights": "the weights",
    "buffers": "the buffers",
    "values": "the states and multipliers",
    "loss": "the loss",
    "rows": "the number of rows",
    "inputs": "the inputs",
    "dtype": "the precision",
    "modes": "the modes",
    "required": "the identities that the program has",
}
"""What a certificate is bound to, in words."""


class Residual(Measured):
    """One number that should be zero."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    kind: Kind
    name: str
    """Module path, state or parameter, in the user's names."""
    mode: str
    """train or eval."""
    value: float
    tolerance: float
    scale: float
    """Size of what was compared: the value is relative to it (KKT residuals are not); 0 where there was nothing."""

    @property
    def ok(self) -> bool:
        """Within its tolerance (a NaN is not)."""
        return 0.0 <= self.value <= self.tolerance


class Certificate(Measured):
    """Residuals of a lifted model or of a solution; `Certificate.made` makes one."""

    FILE = ("certificate", "residuals")
    model_config = ConfigDict(ser_json_inf_nan="constants")

    format: Literal[3] = 3
    claim: Claim
    """network: the cut network is the model; solution: a point satisfies the program's KKT conditions."""
    model: str
    program: str
    """Digest of the program's JSON."""
    stages: str
    """Digest of the stages' graphs."""
    weights: str
    """Digest of the parameters by name."""
    buffers: str
    """Digest of the buffers by name."""
    values: str = ""
    """Digest of a solution's states, multipliers and free inputs."""
    loss: str
    """Name of the loss."""
    losses: tuple[float, ...] = ()
    """Its value in each mode: many losses have one name."""
    rows: int
    inputs: str
    """Digest of the inputs and targets that were used."""
    modes: tuple[str, ...]
    dtype: str
    seed: int
    required: str
    """Digest of the identities that the program has."""
    residuals: tuple[Residual, ...]
    facts: tuple[str, ...] = ()
    """What was shown beyond residuals, in sentences."""
    unassessed: tuple[str, ...] = ()
    """What could not be decided, and why; only a global bound makes up for it."""
    versions: Mapping[str, str] = Field(default_factory=dict)
    digest: str
    """Digest of everything above."""

    @field_validator("format", mode="before")
    @classmethod
    def _of_this_edition(cls, value: object) -> object:
        if value in (1, 2):
            raise ValueError(
                f"the certificate is of format {value}, this edition reads 3: measure it again (verify --out)"
            )
        return value

    @classmethod
    def made(cls, required: Iterable[Identity], **fields: Any) -> Certificate:
        """A certificate of what was measured, with its digest.

        Args:
            required: the identities that the program has; those that were not measured are said to be unassessed.
            fields: all but format, digest, required, versions, dtype and seed.
        """
        needed = sorted(set(required))
        residuals: Sequence[Residual] = fields["residuals"]
        measured = {(r.kind, r.name, r.mode) for r in residuals}
        opened = tuple(fields.pop("unassessed", ()))
        if not opened:  # what is open gives its reason itself
            opened = tuple(
                f"{k} of {n} in {m} mode was not measured" for k, n, m in needed if (k, n, m) not in measured
            )
        draft = cls(
            required=identities_digest(needed),
            unassessed=opened,
            versions=versions(),
            dtype="float64",
            seed=0,
            digest="",
            **fields,
        )
        return draft.model_copy(update={"digest": draft.own_digest()})

    def own_digest(self) -> str:
        """Compute what `digest` should be: the digest of the content."""
        content = json.loads(self.model_dump_json(exclude={"digest"}))
        return digest([json.dumps(content, sort_keys=True)])

    @property
    def verdict(self) -> Verdict:
        """Say whether it holds, fails, or was not assessed."""
        if self.digest == self.own_digest() and not all(r.ok for r in self.residuals):
            return "failed"
        return "not assessed" if self.reasons else "ok"

    @property
    def ok(self) -> bool:
        """Whether every identity of the program was measured and lies within its tolerance."""
        return self.verdict == "ok"

    @property
    def exit_code(self) -> int:
        """Exit status: 0 ok, 1 failed, 3 not assessed."""
        return EXIT[self.verdict]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons why it was not assessed, in sentences; empty where it was."""
        return tuple(dict.fromkeys(self._reasons()))

    def _reasons(self) -> Iterable[str]:
        if self.digest != self.own_digest():
            yield "the certificate was changed after it was made: its content does not have its digest"
        if not any(r.kind == "global bound" for r in self.residuals):
            yield from self.unassessed
        if self.rows < 1:
            yield "there are no rows: nothing was measured"
        if self.modes != MODES[self.claim]:
            yield f"measured in {' and '.join(self.modes) or 'no'} mode, not in {' and '.join(MODES[self.claim])}"
        for mode in MODES[self.claim]:
            if not any(r.mode == mode for r in self.residuals):
                yield f"nothing was measured in {mode} mode"
        for r in self.residuals:
            if not r.scale > 0.0 or not math.isfinite(r.scale):
                yield f"{r.kind} in {r.mode} mode compares nothing but zeros: use other rows or other weights"
            if not 0.0 <= r.tolerance <= LARGEST_TOLERANCE:
                yield f"a tolerance of {r.tolerance:g} says nothing: at most {LARGEST_TOLERANCE:g}"
            if r.mode not in self.modes:
                yield f"{r.kind} of {r.name} is of a mode '{r.mode}' that was not asked for"

    @property
    def worst(self) -> Residual | None:
        """Residual that is largest relative to its tolerance; one that is not a number comes first."""
        return max(self.residuals, key=_rank, default=None)

    def check(
        self,
        lifted: Any,
        inputs: Any = None,
        target: Any = None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        tolerance: float = USUAL["network"],
    ) -> list[str]:
        """List what speaks against this being a valid certificate of a lifted model; empty where it is one.

        Args:
            lifted: what `lagcompile.lift` gave.
            inputs: the batch to measure again on; None compares program, stages, weights and buffers alone.
            target: what the loss compares with.
            loss: (output, target) -> scalar.
            kwargs: keyword arguments of the forward.
            tolerance: largest residual; the certificate's own tolerances count for nothing.
        """
        if not hasattr(lifted, "network"):
            raise SpecError(f"lifted takes what lagcompile.lift gave, got an object of type {type(lifted).__name__}")
        expect_positive("tolerance", tolerance)
        found = [] if self.ok else [f"the certificate itself: {self.verdict}", *self.reasons]
        if self.claim == "solution":
            return [*found, "it is of a solution's KKT conditions, not of a network: measure those again"]
        if loss is None:
            from lagcompile.check.binding import bindings, network_identities

            required = identities_digest(network_identities(lifted.program))
            here = bindings(lifted.network, lifted.program) | {"required": required}
            found += [_above(r, r.value, tolerance) for r in self.residuals if not r.value <= tolerance]
            return found + [_differs(k, getattr(self, k), v) for k, v in here.items() if getattr(self, k) != v]
        measured = lifted.verify(inputs, target, loss=loss, kwargs=kwargs, tolerance=tolerance)
        return found + differences(self, measured)

    def save(self, path: str | Path) -> Path:
        """Write the certificate as JSON."""
        target = path_of("path", path)
        replace(target, self.file_bytes())
        return target

    def file_bytes(self) -> bytes:
        """The certificate as a file, JSON."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate.

        Raises:
            DataError: the file does not exist, is not a certificate (each problem names a line and a key), or was
                changed after it was made.
        """
        found = validate(path_of("path", path), cls)
        if found.digest != found.own_digest():
            raise DataError(f"{path}: the certificate was changed after it was made: measure it again (verify --out)")
        return found

    def __str__(self) -> str:
        word = {"ok": "ok", "failed": "NOT ok", "not assessed": "NOT assessed"}[self.verdict]
        loosest = largest(r.tolerance for r in self.residuals if r.kind != "global bound")
        if self.ok and loosest > USUAL[self.claim]:
            word += f" to {loosest:.0e} only, {USUAL[self.claim]:.0e} is usual"
        lines = [f"certificate for {self.model} in {self.dtype}: {word} ({self.rows} rows)"]
        for mode in dict.fromkeys(r.mode for r in self.residuals):
            for kind in dict.fromkeys(r.kind for r in self.residuals if r.mode == mode):
                group = [r for r in self.residuals if r.kind == kind and r.mode == mode]
                worst = max(group, key=_rank)
                mark = "ok" if all(r.ok for r in group) else "FAILS"
                lines.append(
                    f"  {mode:5}  {kind:19} {len(group):4} checked, worst {worst.value:.1e} "
                    f"(at most {worst.tolerance:.0e}) {mark}: {worst.name}"
                )
        lines += [f"  NOT assessed: {reason}" for reason in self.reasons]
        return "\n".join([*lines, *(f"  {f}" for f in self.facts)])


def differences(saved: Certificate, measured: Certificate) -> list[str]:
    """List where a new measurement differs from a certificate; empty where it confirms it.

    Residuals of both are compared with the tolerances of the new one, not for equality: rounding may differ between
    machines, and who writes a file chooses what stands in it.
    """
    found = [_differs(k, getattr(saved, k), getattr(measured, k)) for k in BOUND if _other(k, saved, measured)]
    if len(saved.losses) != len(measured.losses):
        found.append("the loss: its values were not measured in the same modes")
    for mode, old, new in zip(saved.modes, saved.losses, measured.losses, strict=False):
        if not math.isclose(old, new, rel_tol=SAME_LOSS):
            found.append(f"the loss: in {mode} mode it was {old:.9g}, here it is {new:.9g}")
    by_name = {(r.kind, r.name, r.mode): r for r in measured.residuals}
    for was in saved.residuals:
        again = by_name.pop((was.kind, was.name, was.mode), None)
        if again is None:
            found.append(f"{was.kind} of {was.name} in {was.mode} mode: no longer measured")
        else:
            worst = again.value if not again.ok else was.value
            found += [] if worst <= again.tolerance else [_above(was, worst, again.tolerance)]
    return found + [f"{kind} of {name} in {mode} mode: not in the certificate" for kind, name, mode in by_name]


def _other(key: str, saved: Certificate, measured: Certificate) -> bool:
    return bool(getattr(saved, key) != getattr(measured, key))


def _differs(key: str, old: Any, new: Any) -> str:
    return f"{BOUND[key]}: the certificate was made for {old}, here it is {new}"


def _above(was: Residual, value: float, tolerance: float) -> str:
    said = f" (the certificate says {was.value:.1e})" if value != was.value else ""
    return f"{was.kind} of {was.name} in {was.mode} mode: {value:.1e} is above the tolerance {tolerance:.0e}{said}"


def _rank(residual: Residual) -> float:
    found = residual.value / max(residual.tolerance, 1e-300)
    return math.inf if math.isnan(found) else found


def largest(values: Iterable[float]) -> float:
    """The largest number, 0 of none; NaN where one is not a number (`max` would hide it)."""
    found = list(values)
    return math.nan if any(math.isnan(v) for v in found) else max(found, default=0.0)


def versions() -> dict[str, str]:
    """Versions that a certificate was made with."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("lagcompile")
    except PackageNotFoundError:
        own = "unknown"
    return {"lagcompile": own, "torch": torch.__version__, "python": platform.python_version()}


def identities_digest(identities: Iterable[Identity]) -> str:
    """Digest of a set of identities."""
    return digest([part for identity in sorted(set(identities)) for part in identity])


def digest(values: Sequence[Any]) -> str:
    """Short digest of tensors and texts, in order."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().reshape(-1)
            head = f"{value.dtype}{tuple(value.shape)}"
            body = array.view(torch.uint8).numpy().tobytes() if array.numel() else b""
        else:
            head, body = type(value).__name__, str(value).encode()
        found.update(f"{head} {len(body)} ".encode())
        found.update(body)
    return found.hexdigest()[:16]
