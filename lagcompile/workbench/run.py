"""The driver: from a spec to a solution, a certificate and a report.

In: `Prepared` and where to write. Out: `Outcome`. Invariant: nothing is written before data, model, program and method
have been bound; a resumed run takes the steps that an unbroken one would have taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lagcompile.backends.base import seeded
from lagcompile.backends.keeping import FREE, Steps, identity_of, keeping_of, program_files
from lagcompile.backends.method import Solver
from lagcompile.check.certificate import Certificate
from lagcompile.check.kkt import certify_kkt
from lagcompile.ir.base import DataError, ProgramError, SpecError
from lagcompile.ir.solution import Solution, Status
from lagcompile.ir.yamlfile import dumps, spec_hash
from lagcompile.lift import Lifted, lift
from lagcompile.runtime.instance import Instance
from lagcompile.store.folder import (
    CERTIFICATE,
    KKT,
    MODEL,
    SOLUTION,
    SPEC,
    Notice,
    RunFolder,
    check_free,
    load_tensors,
    tensor_bytes,
)
from lagcompile.store.keeping import Keeping
from lagcompile.store.stop import Stop
from lagcompile.workbench.baseline import Trained, backprop
from lagcompile.workbench.measure import StateDefect, evaluator, outcome, state_defects
from lagcompile.workbench.prepare import Prepared, fresh_model
from lagcompile.workbench.spec import Running, RunSpec
from lagcompile.workbench.supervise import Supervised

VERIFIED = 64
"""Examples that a certificate is measured on."""

Report = Callable[["Outcome"], Mapping[str, bytes]]
"""Gives further files for a run folder."""
Look = Callable[[str, int, Mapping[str, float]], None]
"""Called with the name of a run ("solve" or "backprop"), its number of steps and each row of its history."""


@final
@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        prepared: spec, data, fresh module and program.
        solution: what the method reached.
        test: loss and accuracy of the solution's module on the test part.
        defects: final defects by state; empty where states have no row for each example.
        certificate: of the solution's module.
        baseline: plain backprop, where it was asked for and reached.
        baseline_test: its loss and accuracy on the test part.
        folder: the run folder; None where nothing was written.
        conditions: the KKT conditions at the solution, where the method solves for them.
        stopped: exit status for the signal that came in; 0 for none.
    """

    prepared: Prepared
    solution: Solution
    test: Mapping[str, float]
    defects: tuple[StateDefect, ...]
    certificate: Certificate
    baseline: Trained | None
    baseline_test: Mapping[str, float]
    folder: Path | None = None
    conditions: Certificate | None = None
    stopped: int = 0

    @property
    def exit_code(self) -> int:
        """0 fine, 1 diverged, worse than at the start or a check failed, 3 a check says nothing, above 128 a signal."""
        statuses = {self.solution.status, self.baseline.status if self.baseline else Status.STEPS_DONE}
        if self.stopped or Status.INTERRUPTED in statuses:
            return self.stopped or 130
        codes = {c.exit_code for c in (self.certificate, self.conditions) if c is not None}
        if self.solution.status in (Status.DIVERGED, Status.WORSE) or 1 in codes:
            return 1
        return max(codes)

    @property
    def defect(self) -> float | None:
        """Mean absolute defect over all states and examples; None where it is not defined."""
        found = self.solution.details.get("final", {}).get("defect")
        return None if found is None else float(found)


def solve(
    prepared: Prepared,
    *,
    folder: Path | None,
    force: bool = False,
    resume: bool = False,
    baseline: bool | None = None,
    look: Look | None = None,
    stop: Stop | None = None,
    report: Report | None = None,
    notice: Notice = warnings.warn,
) -> Outcome:
    """Run a spec to its end.

    Args:
        prepared: the spec, its data and its module.
        folder: the run folder to make; None writes nothing.
        force: replace a run folder that is there.
        resume: resume from the folder's newest undamaged checkpoint.
        baseline: whether to run plain backprop next to it; None as the spec says.
        look: called with each row of the history.
        stop: a request to stop; None listens to Ctrl-C, SIGTERM and SIGHUP.
        report: gives further files for the folder.
        notice: called with a sentence on what is damaged in the folder and does no harm.

    Raises:
        SpecError: data, loss, program or method do not fit.
        DataError: the folder exists, is in use, cannot be written, or holds nothing to resume from.
        KeyboardInterrupt: a second Ctrl-C; the folder holds the last checkpoint.
    """
    loaded, spec, options = prepared.loaded, prepared.loaded.spec, prepared.loaded.spec.run.options()
    if resume and folder is None:
        raise DataError("--resume needs a run folder")
    if folder is not None and not resume:
        check_free(folder, force=force)
    method, heard = spec.method, stop or Stop()
    with ExitStack() as stack:
        stack.enter_context(loaded.importing())
        executor = None
        if method.stepwise:
            executor = Supervised(prepared.executor(), spec.schedule, total=spec.run.steps)
        instance = prepared.instance() if executor is None else executor.instance
        if stop is None:
            stack.enter_context(heard.listening())
        watch = None if look is None else lambda row: look("solve", spec.run.steps, row)
        keeping = stack.enter_context(keeping_of(options, heard, instance.device, watch))
        if executor is not None:
            stack.enter_context(seeded(instance, options))
        if folder is not None:
            identity = identity_of(instance, _fixed(spec))
            keeping.keep_in(folder, _first_files(prepared), identity, resume=resume, notice=notice, force=force)
        conditions, rival = None, None
        if executor is not None:
            run = Steps(executor, options, keeping)
            solution = run.solve(original=prepared.model, evaluate=evaluator(prepared.data, loaded.loss))
            if (spec.rival.run if baseline is None else baseline) and solution.status is not Status.INTERRUPTED:
                rival = _rival(prepared, solution.gradient_evaluations, keeping.folder, look=look, stop=heard)
        else:
            solution = _at_once(prepared, method, instance, keeping)
            conditions = certify_kkt(instance, solution)
        found = replace(_concluded(prepared, solution, rival), folder=folder, conditions=conditions)
        rows = solution.history.rows
        keeping.finish(_last_files(found) | dict(report(found) if report else {}), rows)
        return replace(found, stopped=heard.exit_status if heard.asked else 0)


def _at_once(prepared: Prepared, method: Solver, instance: Instance, keeping: Keeping) -> Solution:
    """Run a method that solves the whole program at once: no schedule, and no backprop next to it."""
    options = prepared.loaded.spec.run.options()
    try:
        found = method.solve(instance, options, original=prepared.model, watch=keeping.watch, keeper=keeping)
    except ProgramError as error:
        raise SpecError([prepared.loaded.problem("method", p) for p in error.problems]) from error
    keeping.ended(found.status)
    return found


def _fixed(spec: RunSpec) -> str:
    """Hash of what must not change when a run is resumed."""
    free = {*FREE, "device"} | ({"steps"} if spec.method.stepwise else set())
    kept = spec.run.model_copy(update={name: Running.model_fields[name].default for name in free})
    if spec.schedule.given():  # step sizes depend on the number of steps
        kept = kept.model_copy(update={"steps": spec.run.steps})
    method = spec.method.model_copy(update={n: type(spec.method).model_fields[n].default for n in spec.method.FREE})
    free_keys = {"run": kept, "method": method, "baseline": False, "note": "", "tolerance": 1.0}
    return spec_hash(spec.model_copy(update=free_keys))


def _first_files(prepared: Prepared) -> dict[str, bytes]:
    return {SPEC: dumps(prepared.loaded.spec).encode(), **program_files(prepared.program)}


def _last_files(found: Outcome) -> dict[str, bytes]:
    """Weights, certificates, and of exact methods the whole solution."""
    solution, spec = found.solution, found.prepared.loaded.spec
    files = {MODEL: tensor_bytes(solution.model.state_dict()), CERTIFICATE: found.certificate.file_bytes()}
    moved: Mapping[str, Tensor] = solution.details.get("inputs") or {}
    if moved or not spec.method.stepwise:  # small, and the very result
        exact = dict(solution.details.get("weights", {}))
        parts = {"states": dict(solution.states), "multipliers": dict(solution.multipliers), "inputs": dict(moved)}
        files[SOLUTION] = tensor_bytes(parts | {"weights": exact})
    if found.conditions is not None:
        files[KKT] = found.conditions.file_bytes()
    return files


def _rival(prepared: Prepared, evaluations: int, place: RunFolder | None, *, look: Look | None, stop: Stop) -> Trained:
    loaded, spec = prepared.loaded, prepared.loaded.spec
    return backprop(
        fresh_model(loaded),
        prepared.data,
        spec.run.options(),
        loss=loaded.loss,
        rule=spec.rival.weights,
        schedules=spec.schedule,
        evaluations=evaluations,
        stop=stop,
        device=spec.run.device,
        evaluate=evaluator(prepared.data, loaded.loss),
        watch=None if look is None else lambda row: look("backprop", evaluations, row),
        folder=place,
    )


def _concluded(prepared: Prepared, solution: Solution, rival: Trained | None) -> Outcome:
    data, loss = prepared.data, prepared.loaded.loss
    solved = relift(prepared, solution.model)
    moved: Mapping[str, Tensor] = solution.details.get("inputs") or {}  # inputs that were solved for
    x = next(iter(moved.values())).to(data.train_x.dtype) if moved else data.train_x
    certificate = certify(prepared, solution.model)
    return Outcome(
        prepared=prepared,
        solution=replace(solution, certificate=certificate),
        test=outcome(solution.model, data.test_x, data.test_y, loss=loss),
        defects=state_defects(solved, solution.states, x) if solution.states else (),
        certificate=certificate,
        baseline=rival,
        baseline_test=outcome(rival.model, data.test_x, data.test_y, loss=loss) if rival is not None else {},
    )


def relift(prepared: Prepared, model: torch.nn.Module) -> Lifted:
    """The same lifting of a module with other weights."""
    loaded = prepared.loaded
    x = prepared.data.train_x[:8]
    with loaded.importing():
        return lift(model.cpu(), (x,), loaded.split, loaded.spec.formulation, name=loaded.spec.name)


def certify(prepared: Prepared, model: torch.nn.Module, examples: int = VERIFIED) -> Certificate:
    """Certificate of a module's weights on the first training examples."""
    data, loaded = prepared.data, prepared.loaded
    return prepared.lifted.verify(
        (data.train_x[:examples],),
        data.train_y[:examples],
        loss=loaded.loss,
        tolerance=loaded.spec.tolerance,
        weights=model.state_dict(),
    )


def load_weights(prepared: Prepared, path: Path) -> torch.nn.Module:
    """The spec's module with the weights of a file.

    Raises:
        SpecError: the weights do not fit the module.
        DataError: the file does not exist, or it is damaged.
    """
    state = load_tensors(path)
    with prepared.loaded.importing():
        model = fresh_model(prepared.loaded)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise SpecError([prepared.loaded.problem("model", f"{path}: {line}") for line in lines]) from error
    return model
