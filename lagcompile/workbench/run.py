"""The driver: from a spec to a solution, a certificate and a report.

In: `Prepared` and where to write. Out: `Outcome`. Invariant: nothing is written before data, model, program and method
have been bound; a resumed run takes the steps that an unbroken one would have taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lagcompile.backends.base import Executor, Method, Solver, best_of, drive
from lagcompile.check.certificate import Certificate
from lagcompile.check.kkt import certify_kkt
from lagcompile.ir.base import DataError, ProgramError, SpecError
from lagcompile.ir.solution import History, Solution, Status
from lagcompile.ir.text import to_json
from lagcompile.ir.yamlfile import dumps, spec_hash
from lagcompile.lift import Lifted, lift
from lagcompile.workbench import folder as files
from lagcompile.workbench.baseline import Trained, backprop
from lagcompile.workbench.folder import RunFolder
from lagcompile.workbench.measure import StateDefect, evaluator, outcome, state_defects
from lagcompile.workbench.prepare import Prepared, fresh_model
from lagcompile.workbench.spec import RunSpec
from lagcompile.workbench.supervise import Stop, Supervised

VERIFIED = 64
"""Examples that a certificate is measured on."""

Look = Callable[[str, int, Mapping[str, float]], None]
"""Called with the name of a run ("solve" or "backprop"), its number of steps and each row of its history."""


@final
@dataclass(frozen=True)
class Outcome:
    """What a run gave.

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
    """

    prepared: Prepared
    solution: Solution
    test: Mapping[str, float]
    defects: tuple[StateDefect, ...]
    certificate: Certificate
    baseline: Trained | None
    baseline_test: Mapping[str, float]
    folder: Path | None
    conditions: Certificate | None = None

    @property
    def exit_code(self) -> int:
        """0 fine, 1 diverged, worse than at the start or a check failed, 3 a check says nothing, 130 interrupted."""
        statuses = {self.solution.status, self.baseline.status if self.baseline else Status.STEPS_DONE}
        if Status.INTERRUPTED in statuses:
            return 130
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
) -> Outcome:
    """Run a spec to its end.

    Args:
        prepared: the spec and what it stands for.
        folder: the run folder to make; None writes nothing.
        force: replace a run folder that is there.
        resume: go on from the folder's checkpoint.
        baseline: whether to run plain backprop next to it; None as the spec says.
        look: called with each row of the history.
        stop: a request to stop; None listens to Ctrl-C.

    Raises:
        SpecError: data, loss, program or method do not fit.
        DataError: the folder exists, or holds no checkpoint to go on from.
    """
    spec = prepared.loaded.spec
    if folder is not None and not resume:
        files.check_free(folder, force=force)
    if not isinstance(spec.method, Method):
        return _at_once(prepared, spec.method, folder, force=force, resume=resume, look=look)
    with prepared.loaded.importing():
        executor = prepared.executor()
        before = _checkpoint(folder, spec) if resume else None
        place = _place(prepared, folder, force=force, resume=resume)
        listening = stop or Stop()
        with listening.on_interrupt() if stop is None else nullcontext():
            solution = _solved(prepared, executor, place, before, look=look, stop=listening)
            rival = None
            wanted = spec.rival.run if baseline is None else baseline
            if wanted and solution.status is not Status.INTERRUPTED:
                rival = _rival(prepared, solution.gradient_evaluations, look=look, stop=listening)
        return _concluded(prepared, solution, rival, place)


def _at_once(
    prepared: Prepared, method: Solver, folder: Path | None, *, force: bool, resume: bool, look: Look | None
) -> Outcome:
    """Run a method that solves the whole program at once: no schedule, no checkpoint, no backprop next to it."""
    loaded, spec = prepared.loaded, prepared.loaded.spec
    if resume:
        raise DataError(f"method '{spec.method.kind}' has no checkpoint to resume: run it again with --force")
    with loaded.importing():
        instance = prepared.instance()
        rows: list[Mapping[str, float]] = []

        def watch(row: Mapping[str, float]) -> None:
            rows.append(row)
            if look is not None:
                look("solve", spec.run.steps, row)

        try:
            solution = method.solve(instance, spec.run.options(), original=prepared.model, watch=watch)
        except ProgramError as error:
            raise SpecError([loaded.problem("method", p) for p in error.problems]) from error
        place = _place(prepared, folder, force=force, resume=False)
        if place is not None:
            place.start_log(list(solution.history.rows))
        conditions = certify_kkt(instance, solution)
        if place is not None:
            place.write(files.KKT, conditions.model_dump_json(indent=2) + "\n")
        return replace(_concluded(prepared, solution, None, place), conditions=conditions)


def _checkpoint(folder: Path | None, spec: RunSpec) -> Mapping[str, Any]:
    if folder is None:
        raise DataError("--resume needs a run folder")
    before = files.reopen(folder).checkpoint()
    if before.get("spec") != _fixed(spec):
        raise DataError(
            f"{folder} was run with another spec, or by a lagcompile with other options: only steps, time limit, "
            "looks, checkpoints, device and baseline may change when a run is resumed"
        )
    return before


def _fixed(spec: RunSpec) -> str:
    """Hash of what may not change when a run is resumed."""
    run = {"steps": 0, "time_limit": None, "look_every": 1, "evaluate_every": None, "checkpoint_every": None}
    kept = spec.run.model_copy(update={**run, "device": "cpu"})
    if spec.schedule.given():  # step sizes depend on the number of steps
        kept = kept.model_copy(update={"steps": spec.run.steps})
    return spec_hash(spec.model_copy(update={"run": kept, "baseline": False, "note": "", "tolerance": 1.0}))


def _place(prepared: Prepared, folder: Path | None, *, force: bool, resume: bool) -> RunFolder | None:
    if folder is None:
        return None
    program = prepared.program
    texts = {
        files.SPEC: dumps(prepared.loaded.spec),
        files.PROGRAM: str(program),
        files.PROGRAM_JSON: to_json(program) + "\n",
    }
    if not resume:
        return files.create(folder, texts, force=force)
    place = files.reopen(folder)
    for name, text in texts.items():
        place.write(name, text)
    return place


def _solved(
    prepared: Prepared,
    executor: Executor,
    place: RunFolder | None,
    before: Mapping[str, Any] | None,
    *,
    look: Look | None,
    stop: Stop,
) -> Solution:
    spec, rows = prepared.loaded.spec, list[Mapping[str, float]]()
    torch.manual_seed(spec.run.seed)

    def save() -> None:
        if place is not None:
            state = {
                "executor": executor.state_dict(),
                "best": best.state_dict(),
                "history": rows,
                "spec": _fixed(spec),
            }
            place.save(files.CHECKPOINT, state)

    supervised = Supervised(
        executor, spec.schedule, total=spec.run.steps, stop=stop, save=save, save_every=spec.run.checkpoint_every
    )
    best = best_of(supervised, spec.run.options())
    if before is not None:
        best.load_state_dict(before["best"])
        rows += before["history"]
        supervised.load_state_dict(before["executor"])
    if place is not None:
        place.start_log(rows)

    def watch(row: Mapping[str, float]) -> None:
        rows.append(dict(row))
        if place is not None:
            place.log(row)
        if look is not None:
            look("solve", spec.run.steps, row)

    evaluate = evaluator(prepared.data, prepared.loaded.loss)
    solution = drive(
        supervised,
        spec.run.options(),
        original=prepared.model,
        evaluate=evaluate,
        watch=watch,
        start=History(tuple(rows)),
        best=best,
    )
    save()
    return solution


def _rival(prepared: Prepared, evaluations: int, *, look: Look | None, stop: Stop) -> Trained:
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
    )


def _concluded(prepared: Prepared, solution: Solution, rival: Trained | None, place: RunFolder | None) -> Outcome:
    data, loss = prepared.data, prepared.loaded.loss
    solved = relift(prepared, solution.model)
    moved: Mapping[str, Tensor] = solution.details.get("inputs") or {}  # inputs that were solved for
    x = next(iter(moved.values())).to(data.train_x.dtype) if moved else data.train_x
    certificate = certify(prepared, solution.model)
    found = Outcome(
        prepared=prepared,
        solution=replace(solution, certificate=certificate),
        test=outcome(solution.model, data.test_x, data.test_y, loss=loss),
        defects=state_defects(solved, solution.states, x) if solution.states else (),
        certificate=certificate,
        baseline=rival,
        baseline_test=outcome(rival.model, data.test_x, data.test_y, loss=loss) if rival is not None else {},
        folder=None if place is None else place.path,
    )
    if place is not None:
        place.save(files.MODEL, solution.model.state_dict())
        if moved or not isinstance(prepared.loaded.spec.method, Method):  # small, and what was asked for
            exact = dict(solution.details.get("weights", {}))
            parts = {"states": dict(solution.states), "multipliers": dict(solution.multipliers), "inputs": dict(moved)}
            place.save(files.SOLUTION, parts | {"weights": exact})
        place.write(files.CERTIFICATE, found.certificate.model_dump_json(indent=2) + "\n")
    return found


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
        DataError: there is no such file, or it is damaged.
    """
    state = files.load_tensors(path)
    with prepared.loaded.importing():
        model = fresh_model(prepared.loaded)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise SpecError([prepared.loaded.problem("model", f"{path}: {line}") for line in lines]) from error
    return model
