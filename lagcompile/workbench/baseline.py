"""Plain backprop of the same network, for comparison: a loop as anyone would write it, without lifting.

In: a fresh module, data, a step rule, a number of gradient evaluations. Out: `Trained`. Invariant: initial weights,
order of the rows and batch size are those of the run it is compared with; one gradient evaluation is one step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lagcompile.backends.base import Rows, RunOptions, Watch
from lagcompile.backends.best import Best, Evaluate, at_rest, evaluated, judged, probe_rows
from lagcompile.backends.keeping import hidden, load_hidden, random_state, set_random_state
from lagcompile.ir.base import DataError
from lagcompile.ir.solution import History, Status
from lagcompile.runtime.rules import Rule
from lagcompile.runtime.steps import Extra
from lagcompile.store.folder import RunFolder
from lagcompile.store.keeping import Clock
from lagcompile.store.stop import Stop, StoppedError
from lagcompile.workbench.data import DataSplits
from lagcompile.workbench.measure import Loss
from lagcompile.workbench.schedule import Schedules

BASELINE = "baseline"


@dataclass(frozen=True)
class Trained:
    """Result of the baseline.

    Attributes:
        model: the trained module: the last iterate, or the best one where that is not finite.
        status: why it ended.
        history: rows with step, seconds, loss and held-out numbers.
        gradient_evaluations: forward+backward passes made.
        seconds: wall time of the steps.
    """

    model: nn.Module
    status: Status
    history: History
    gradient_evaluations: int
    seconds: float


def backprop(
    model: nn.Module,
    data: DataSplits,
    options: RunOptions,
    *,
    loss: Loss,
    rule: Rule,
    schedules: Schedules,
    evaluations: int,
    stop: Stop,
    device: str = "cpu",
    evaluate: Evaluate | None = None,
    watch: Watch | None = None,
    folder: RunFolder | None = None,
) -> Trained:
    """Train a module by plain backprop.

    Args:
        model: trained in place.
        data: the training part is used.
        options: batch size, seed and how often to look, in the other run's steps.
        loss: (output, target) -> scalar.
        rule: the step rule.
        schedules: the weights' one is used, over `evaluations` steps.
        evaluations: gradient evaluations to spend.
        stop: asked before each step.
        device: where to compute.
        evaluate: numbers on held-out data.
        watch: called with each row of the history.
        folder: where it is kept, and resumed from where it holds the same run; None keeps nothing.

    Raises:
        DataError: it cannot be kept.
    """
    torch.manual_seed(options.seed)
    model.to(device).train()
    optimizer = Extra([p for p in model.parameters() if p.requires_grad], rule, "descent")
    rows = Rows(len(data.train_x), options.batch_size, options.seed)
    each = evaluations / max(1, options.steps)  # looks come as often as the other run's, counted in evaluations
    look, due = _every(options.look_every, each), _every(options.evaluate_every, each)
    history, status = list[Mapping[str, float]](), Status.STEPS_DONE
    best = Best(lambda: _score(model, data, options, loss, device), model.state_dict)
    clock = Clock(options.checkpoint_every, options.checkpoint_seconds)
    kept = _Kept(model, optimizer, best, history, device, evaluations)
    if folder is not None:
        kept.resume(folder)
    before, begin, paused, done = kept.seconds, time.perf_counter(), 0.0, kept.done
    status = kept.ended or status
    try:
        for step in range(done, evaluations if kept.ended is None else done):
            stop.check()
            if folder is not None and step > 0 and clock.due(step):
                kept.commit(folder, done, before + time.perf_counter() - begin - paused)
            if schedules.weights is not None:
                optimizer.param_groups[0]["lr"] = rule.lr * schedules.weights.at(step, evaluations)
            index = rows.at(step)
            optimizer.zero_grad()
            value = loss(model(data.train_x[index].to(device)), data.train_y[index].to(device))
            value.backward()
            optimizer.step()
            done = step + 1
            if not (look(done) or due(done) or done == evaluations):
                continue
            row = {"loss": float(value.detach())}
            now = time.perf_counter()
            row = {"step": float(done), "seconds": before + now - begin - paused} | row
            if not (best.offer(done) and math.isfinite(row["loss"])):
                status = Status.DIVERGED
            elif evaluate is not None and (due(done) or done == evaluations):
                row |= evaluated(model, evaluate)
            paused += time.perf_counter() - now
            history.append(row)
            if watch is not None:
                watch(row)
            if status is Status.DIVERGED:
                break
    except StoppedError:
        status = Status.INTERRUPTED
    seconds = before + time.perf_counter() - begin - paused
    if folder is not None:
        kept.commit(folder, done, seconds, status)
    status, back = best.ended(status, done)
    if back:
        model.load_state_dict(best.kept)
    return Trained(model.cpu(), status, History(tuple(history)), done, seconds)


@dataclass
class _Kept:
    """The state of a run of plain backprop between two steps."""

    model: nn.Module
    optimizer: Extra
    best: Best
    history: list[Mapping[str, float]]
    device: str
    evaluations: int
    done: int = 0
    seconds: float = 0.0
    ended: Status | None = None

    def commit(self, folder: RunFolder, done: int, seconds: float, ended: Status | None = None) -> None:
        """Keep it."""
        whole = ended not in (None, Status.INTERRUPTED)
        state = {
            "evaluations": self.evaluations,
            "done": done,
            "seconds": seconds,
            "ended": ended.name if ended is not None and whole else None,
            "model": self.model.state_dict(),
            "hidden": hidden(self.model),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best.state_dict(),
            "rows": self.history,
            "random": random_state(torch.device(self.device)),
        }
        folder.commit(state, done, BASELINE, final=whole)

    def resume(self, folder: RunFolder) -> None:
        """Resume from what is kept, where that is a run of as many gradient evaluations."""
        try:
            state = folder.state(BASELINE)
        except DataError as error:  # its content can be computed again
            for problem in error.problems:
                folder.notice(f"{problem}; the baseline begins anew")
            return
        if state is None or state["evaluations"] != self.evaluations:
            return
        self.model.load_state_dict(state["model"])
        load_hidden(self.model, state["hidden"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best.load_state_dict(state["best"])
        self.history += state["rows"]
        set_random_state(torch.device(self.device), state["random"])
        self.done, self.seconds = int(state["done"]), float(state["seconds"])
        self.ended = Status[state["ended"]] if state["ended"] else None


def _score(model: nn.Module, data: DataSplits, options: RunOptions, loss: Loss, device: str) -> float:
    """Loss of the present weights on the probe's rows, in eval mode."""
    rows = probe_rows(len(data.train_x), options.batch_size)
    count, total = sum(len(r) for r in rows), 0.0
    with at_rest(model):
        for r in rows:
            total += float(loss(model(data.train_x[r].to(device)), data.train_y[r].to(device))) * len(r) / count
    return judged(total, model.state_dict().values())


def _every(steps: int | None, each: float) -> Callable[[int], bool]:
    """Return whether a step is due, counted in the other run's steps; None for never."""
    often = 0 if steps is None else max(1, round(steps * each))
    return lambda step: often > 0 and step % often == 0
