"""The run spec: one YAML file says which model, which data, where to cut, what to solve and how.

In: the path of a YAML file. Out: `RunSpec`, and `Loaded` with every name resolved to a Python object. Invariant:
all problems of a file are reported at once, each with its line; the user's code is imported here, and not called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, final

import torch
from pydantic import ConfigDict, Field, JsonValue

from lagcompile.backends.base import RunOptions
from lagcompile.check.certificate import USUAL
from lagcompile.frontend.lower import Formulation
from lagcompile.frontend.split import AutoSplit, BalancedSplit, Split, SplitFile, SplitPolicy
from lagcompile.ir.base import NAME, DataError, Frozen, SpecError
from lagcompile.ir.places import contained
from lagcompile.ir.schemaerrors import KeyPath
from lagcompile.ir.trust import Scope, trusting
from lagcompile.ir.yamlfile import Document, check, read, validate
from lagcompile.runtime.rules import Adam, RuleSpec
from lagcompile.workbench.methods import MethodSpec
from lagcompile.workbench.references import DATA, LOSSES, MODELS, Wanted, resolve_all
from lagcompile.workbench.schedule import Schedules
from lagcompile.workbench.trusted import scope_of


class Reference(Frozen):
    """A built-in name, or `package.module:attribute` of your own, and its keyword arguments."""

    name: str
    """Short name, or package.module:attribute of something importable from here or from the spec's folder."""
    args: Mapping[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments."""


class Running(RunOptions):
    """How long a method runs, on which rows, where, and how often it is looked at and saved."""

    device: str = "cpu"
    """cpu, cuda or cuda:1."""

    def options(self) -> RunOptions:
        """The part that the method reads."""
        return RunOptions(**{name: getattr(self, name) for name in RunOptions.model_fields})


class Baseline(Frozen):
    """Plain backprop of the same network: same initial weights, data order, batch size and gradient evaluations."""

    run: bool = True
    """False: only with --baseline."""
    weights: RuleSpec = Adam(lr=1e-3)
    """Its step rule."""


def _with_backend(schema: dict[str, Any]) -> None:
    """Add the short form `backend:` to the JSON schema of a run."""
    schema["required"].remove("method")
    kinds = list(schema["properties"]["method"]["discriminator"]["mapping"])
    words = "Short for method.kind: `backend: sqp` is `method: {kind: sqp}`; further options go under method."
    schema["properties"]["backend"] = {"enum": kinds, "description": words}
    schema["anyOf"] = [{"required": ["method"]}, {"required": ["backend"]}]


class RunSpec(Frozen):
    """One run. `lagcompile schema` prints the JSON schema of this class."""

    model_config = ConfigDict(json_schema_extra=_with_backend)

    FILE = ("run spec", "lagcompile")

    lagcompile: Literal[1]
    """Version of this format."""
    name: str = Field(pattern=NAME)
    """Name of the run, of its program and of its folder."""
    note: str = ""
    """A sentence for the report."""
    model: Reference
    """A module class, or a function that gives a module."""
    data: Reference
    """A function that gives training, validation and test data."""
    loss: str = "cross_entropy"
    """Short name, or package.module:attribute of a function (output, target) -> scalar."""
    split: Annotated[int, Field(ge=1)] | str | Split = AutoSplit()
    """Number of balanced stages, path of a split spec (from this file's folder), or a policy."""
    formulation: Formulation = Formulation()
    """What the program says about states, defects and multipliers."""
    method: MethodSpec
    """How the program is solved."""
    schedule: Schedules = Schedules()
    """How the method's step sizes change over the run."""
    run: Running = Running()
    """Steps, batch size, seed, device."""
    baseline: bool | Baseline = Baseline(run=False)
    """true, or a step rule: train the same network by plain backprop next to it."""
    tolerance: float = Field(default=USUAL["network"], gt=0)
    """Largest relative residual of the certificate."""

    @property
    def rival(self) -> Baseline:
        """The baseline's options, whether or not it runs by default."""
        return self.baseline if isinstance(self.baseline, Baseline) else Baseline(run=self.baseline)


@final
@dataclass(frozen=True)
class Loaded:
    """A spec with its names resolved.

    Attributes:
        spec: with the split as a policy.
        document: the file, for problems with line numbers.
        model: gives the module.
        data: gives the data.
        loss: (output, target) -> scalar.
        folder: the folder that the file lies in.
        scope: what its names may reach.
    """

    spec: RunSpec
    document: Document
    model: Callable[..., Any]
    data: Callable[..., Any]
    loss: Callable[..., Any]
    folder: Path
    scope: Scope

    @property
    def split(self) -> SplitPolicy:
        """The split policy."""
        split = self.spec.split
        assert not isinstance(split, str)
        return BalancedSplit(stages=split) if isinstance(split, int) else split

    def problem(self, key: str, message: str) -> str:
        """A problem at a dotted key of the file, with its line."""
        return self.document.problem(tuple(key.split(".")), message)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Resolve names within the spec's scope, with the person's modules importable."""
        with trusting(self.scope):
            yield

    def path(self, name: str) -> Path:
        """Return the real path of a name in the spec.

        Raises:
            SpecError: it leads out of the spec's folder.
        """
        return contained(name, self.folder, trusted=self.scope.inside)


def load(path: str | Path, *, trust: Sequence[str] = (), **overrides: object) -> Loaded:
    """Read a spec, resolve its names and its split file.

    Args:
        path: the YAML file.
        trust: modules that the spec may name besides what is built in.
        overrides: fields of `run` that replace the file's, such as steps=10; None keeps the file's.

    Raises:
        SpecError: every problem of the file, in the order of its lines.
    """
    document = _long(read(path, RunSpec))
    if isinstance(document.data, dict) and document.data.get("kind") == "shooting":
        problem = "this is a multiple-shooting spec: `lagcompile solve` runs it, the other commands take no such spec"
        raise SpecError(document.problem(("kind",), problem))
    spec = check(document, RunSpec)
    wanted = _wanted(spec, document)
    scope = scope_of(Path(path), trust)
    folder = Path(path).resolve().parent
    problems: list[tuple[int, str]] = []
    targets: dict[KeyPath, Callable[..., Any]] = {}
    with trusting(scope):
        for key, entry in wanted.items():
            try:
                targets[key] = resolve_all([entry])[0]
            except SpecError as error:
                problems += [(document.line(key), p) for p in error.problems]
    try:
        spec = spec.model_copy(update={"split": _split(spec.split, folder, scope, document)})
    except SpecError as error:
        problems += [(document.line(("split",)), p) for p in error.problems]
    changed = {name: value for name, value in overrides.items() if value is not None}
    device = str(changed.get("device", spec.run.device))
    problems += [(document.line(("run", "device")), p) for p in _device_problems(device, document)]
    if problems:
        raise SpecError([text for _, text in sorted(problems, key=lambda p: p[0])])
    spec = spec.model_copy(update={"run": Running(**{**spec.run.model_dump(), **changed})})
    model, data, loss = (targets[key] for key in (("model", "name"), ("data", "name"), ("loss",)))
    return Loaded(spec, document, model, data, loss, folder, scope)


def _wanted(spec: RunSpec, document: Document) -> dict[KeyPath, Wanted]:
    """Every name of code in a spec, by its key."""
    found: dict[KeyPath, tuple[str, Mapping[str, Callable[..., Any]], Mapping[str, object] | None]] = {
        ("model", "name"): (spec.model.name, MODELS, spec.model.args),
        ("data", "name"): (spec.data.name, DATA, spec.data.args),
        ("loss",): (spec.loss, LOSSES, None),
    }
    for index, constraint in enumerate(spec.formulation.constraints):
        if constraint.function is not None:
            found["formulation", "constraints", index, "function"] = (constraint.function, {}, None)
    return {key: Wanted(*entry[:2], document.problem(key, "")[:-2], entry[2]) for key, entry in found.items()}


def _long(document: Document) -> Document:
    """The document with `method.kind` where it has the short form `backend`."""
    if not isinstance(document.data, dict) or "backend" not in document.data:
        return document
    data = dict(document.data)
    backend, method = data.pop("backend"), data.get("method", {})
    if not isinstance(method, dict):
        return replace(document, data=data)
    kind = method.get("kind", backend)
    if kind != backend:
        message = f"'{backend}' here and '{kind}' in method.kind say different things: keep one of them"
        raise SpecError(document.problem(("backend",), message))
    here = document.line(("backend",))
    lines = {("method",): here, **document.lines, ("method", "kind"): here}
    return replace(document, data={**data, "method": {**method, "kind": backend}}, lines=lines)


def _split(split: int | str | SplitPolicy, folder: Path, scope: Scope, document: Document) -> int | SplitPolicy:
    if not isinstance(split, str):
        return split
    try:
        real = contained(split, folder, trusted=scope.inside)
    except SpecError as error:
        raise SpecError([document.problem(("split",), p) for p in error.problems]) from None
    try:
        found = real.is_file()
    except OSError:  # such as a name that is too long
        found = False
    if not found:
        raise SpecError(document.problem(("split",), f"there is no split spec '{split}' in this file's folder"))
    return validate(real, SplitFile).split


def default_folder(name: str) -> Path:
    """Where a run is written if the command does not say it: runs/NAME.

    Raises:
        DataError: a link leads it out of where the command runs.
    """
    folder = Path("runs") / name
    if not folder.resolve().is_relative_to(Path.cwd().resolve()):
        raise DataError(f"{folder} leads to {folder.resolve()}: name that folder with --out if you mean it")
    return folder


def _device_problems(device: str, document: Document) -> Iterator[str]:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        yield document.problem(("run", "device"), f"the device '{device}' cannot be used here: {reason}")
