"""From a loaded spec to data, module, lifted program and executor; nothing is written.

In: `Loaded`. Out: `Prepared`, then an executor. Invariant: what is wrong is a `SpecError` with the line of the spec;
the module's initial weights depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lagcompile.backends.base import Executor
from lagcompile.frontend.plan import size
from lagcompile.ir.base import BindError, DataError, LagcompileError, LiftError, ProgramError, SpecError, SplitError
from lagcompile.ir.machine import available_memory
from lagcompile.ir.program import Program
from lagcompile.lift import Lifted, lift
from lagcompile.runtime.allocation import SMALL, WithinMemory
from lagcompile.runtime.dataset import as_tensors
from lagcompile.runtime.instance import Instance
from lagcompile.workbench.data import DataSplits
from lagcompile.workbench.references import paths_of
from lagcompile.workbench.spec import Loaded, Reference

EXAMPLES = 8


@final
@dataclass(frozen=True)
class Prepared:
    """A spec with its data, module and lifted program.

    Attributes:
        loaded: the spec.
        data: training, validation and test part.
        model: a fresh module with seeded weights; never changed.
        lifted: the module, compiled.
    """

    loaded: Loaded
    data: DataSplits
    model: nn.Module
    lifted: Lifted

    @property
    def program(self) -> Program:
        """The program, with the loss by its name in the spec."""
        program = self.lifted.program
        objective = program.objective.model_copy(update={"loss": self.loaded.spec.loss})
        return program.model_copy(update={"objective": objective})

    def instance(self) -> Instance:
        """The program bound to the training part, on the run's device.

        Raises:
            SpecError: data, loss and program do not fit each other.
        """
        loaded = self.loaded
        with loaded.importing(), placing(loaded):
            pair = (self.data.train_x, self.data.train_y)
            return self.lifted.bind(pair, loss=loaded.loss, device=loaded.spec.run.device)

    def asked(self) -> Prepared:
        """Check that the method is defined on the program; no tables are allocated. Returns itself.

        Raises:
            SpecError: it is not: every reason, with the layer's path.
        """
        method = self.loaded.spec.method
        if problems := [self.loaded.problem("method", p) for p in method.problems(self.program)]:
            raise SpecError(problems)
        if method.stepwise and not (method.tables and any(s.storage.kept for s in self.program.states)):
            self.executor()
        return self

    def executor(self) -> Executor:
        """The method's executor, bound to the training part.

        Raises:
            SpecError: data, loss, program or method do not fit each other.
        """
        loaded, run, method = self.loaded, self.loaded.spec.run, self.loaded.spec.method
        with loaded.importing(), placing(loaded):
            instance = self.instance()
            try:
                executor = method.executor(instance, seed=run.seed)
            except ProgramError as error:
                raise SpecError([loaded.problem("method", p) for p in error.problems]) from error
        groups = executor.groups()
        absent = [g for g in loaded.spec.schedule.given() if g not in groups]
        if absent:
            kind, known = loaded.spec.method.kind, ", ".join(groups) or "none"
            problems = [f"method '{kind}' has no step sizes of that group on this program (it has: {known})"]
            raise SpecError([loaded.problem(f"schedule.{group}", p) for group in absent for p in problems])
        return executor


def prepare(loaded: Loaded) -> Prepared:
    """Make data and module, lift the module.

    Raises:
        SpecError: every problem with data and module, or every problem of the lifting.
    """
    with loaded.importing():
        return _prepare(loaded)


def _prepare(loaded: Loaded) -> Prepared:
    problems: dict[str, list[str]] = {"data": [], "model": []}
    data: DataSplits | None = None
    model: nn.Module | None = None
    try:
        data = as_splits(_called(loaded, "data", loaded.spec.data), loaded.spec.data.name)
    except LagcompileError as error:
        problems["data"] = _placed(loaded, "data", error)
    try:
        model = fresh_model(loaded)
    except LagcompileError as error:
        problems["model"] = _placed(loaded, "model", error)
    if data is None or model is None:
        order = sorted(problems, key=lambda key: loaded.document.line((key,)))
        raise SpecError([p for key in order for p in problems[key]])
    x = data.train_x[:EXAMPLES]
    problem = _too_large(model) or _forward_problem(model, x)
    if problem:
        raise SpecError(loaded.problem("model", problem))
    with placing(loaded):
        lifted = lift(model, (x,), loaded.split, loaded.spec.formulation, name=loaded.spec.name)
        _ = lifted.program
    return Prepared(loaded, data, model, lifted)


def fresh_model(loaded: Loaded) -> nn.Module:
    """The module with the weights that the run's seed gives.

    Raises:
        SpecError: it cannot be made, or is not a module.
    """
    torch.manual_seed(loaded.spec.run.seed)
    model = _called(loaded, "model", loaded.spec.model)
    if not isinstance(model, nn.Module):
        raise LiftError(f"'{loaded.spec.model.name}' gives a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _called(loaded: Loaded, key: str, reference: Reference) -> Any:
    target = loaded.model if key == "model" else loaded.data
    args, built_in = dict(reference.args), ":" not in reference.name
    for name in set(paths_of(target)) & set(args) if built_in else ():
        args[name] = _path(loaded, f"{key}.args.{name}", args[name])
    remedy = "take smaller layers" if key == "model" else "take fewer examples"
    try:
        if key == "model" and built_in:  # counted before a number of it is drawn
            with torch.device("meta"):
                problem = _too_large(target(**args))
            if problem:
                raise DataError(problem)
        with WithinMemory(DataError, remedy):
            return target(**args)
    except LagcompileError:
        raise
    except Exception as error:  # a user's function may raise anything
        shown = ", ".join(f"{k}={v!r}" for k, v in reference.args.items())
        raise DataError(f"{reference.name}({shown}) failed: {type(error).__name__}: {_first_line(error)}") from error


def _path(loaded: Loaded, key: str, value: object) -> str:
    """The real path of a path that the spec gives to a built-in function."""
    if not isinstance(value, str):
        raise SpecError(loaded.problem(key, f"expected a path, got {value!r}"))
    try:
        return str(loaded.path(value))
    except SpecError as error:
        raise SpecError([loaded.problem(key, p) for p in error.problems]) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else "no message"


def _placed(loaded: Loaded, key: str, error: LagcompileError) -> list[str]:
    return list(error.problems) if isinstance(error, SpecError) else [loaded.problem(key, p) for p in error.problems]


def _too_large(model: object) -> str:
    """Say why two copies of the module, to lift and to solve, do not fit into memory; empty where they do."""
    if not isinstance(model, nn.Module):
        return ""
    needed = 3 * sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    free = available_memory()
    if needed <= SMALL or needed <= free:
        return ""
    words = f"the weights and their copies need {size(needed)}, but {size(free)} of memory are free"
    return f"{words}: take smaller layers"


def _forward_problem(model: nn.Module, x: Tensor) -> str:
    """Say why the module does not run on the data; empty where it does."""
    import copy

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).eval()(x)
    except Exception as error:
        return (
            f"the model does not run on inputs of shape {list(x.shape)}: {type(error).__name__}: {_first_line(error)}"
        )
    return ""


@contextmanager
def placing(loaded: Loaded) -> Iterator[None]:
    """Turn errors of the compiler into problems of the spec, at the key that they belong to."""
    try:
        yield
    except SplitError as error:
        raise SpecError([loaded.problem("split", p) for p in error.problems]) from error
    except LiftError as error:
        raise SpecError([loaded.problem("model", p) for p in error.problems]) from error
    except ProgramError as error:
        raise SpecError([loaded.problem("formulation", p) for p in error.problems]) from error
    except (BindError, DataError) as error:
        raise SpecError([loaded.problem("data", p) for p in error.problems]) from error


def as_splits(value: object, name: str) -> DataSplits:
    """Data parts from what a data function gives.

    Args:
        value: `DataSplits`, or a mapping with "train", "test" and perhaps "validation", each a data set or a pair of
            tensors.
        name: what reports call it.

    Raises:
        DataError: it is neither, or a part is empty or damaged.
    """
    if isinstance(value, DataSplits):
        return value
    if not isinstance(value, Mapping) or not {"train", "test"} <= set(value) <= {"train", "validation", "test"}:
        raise DataError(
            f"'{name}' gives a {type(value).__name__}, expected lagcompile.workbench.data.DataSplits or a mapping with "
            "the keys train, test and perhaps validation"
        )
    train_x, train_y = as_tensors(value["train"])
    test_x, test_y = as_tensors(value["test"])
    held_x, held_y = as_tensors(value["validation"]) if "validation" in value else (train_x[:0], train_y[:0])
    labels = not train_y.is_floating_point() and train_y.dim() == 1
    classes = tuple(str(i) for i in range(int(train_y.max()) + 1)) if labels else ()
    return DataSplits(train_x, train_y, held_x, held_y, test_x, test_y, classes, name, "given by the user's function")
