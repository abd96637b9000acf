"""Random modules and random cuts: the lifted, cut network is the model, or lifting refuses by name.

Compared are outputs, gradients of parameters and inputs, buffers and the random generator, in eval and train mode, at
three batch sizes and with other weights than at lifting; the user's own tensors stay as they were; a split that was
asked for is made wherever a search of its own finds that many places.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

import lagcompile as lc
from lagcompile.frontend.modes import ByMode
from tests.unseen._cuts import Cuts, cuts
from tests.unseen._grammar import Drawn, Record, draw
from tests.unseen._use import use

CI, NIGHTLY = 300, 10_000
_TOLERANCE = 1e-9
BRANCH = 8
"""Operations of the longest branch that is drawn for one mode."""


def judge(tally: Mapping[str, int], cases: int) -> None:
    """At most 5 % are refused, at most 10 % hold a module that was kept whole."""
    assert tally.get("refused", 0) <= 0.05 * cases, f"{tally['refused']} of {cases} modules are refused"
    assert tally.get("whole", 0) <= 0.10 * cases, f"{tally['whole']} of {cases} modules keep a part whole"


def case(seed: int) -> Mapping[str, int]:
    """Draw a module and a cut, lift, compare."""
    drawn, model, source = valid(seed)
    inputs = values_of(4, seed)
    try:
        lifted = _lift(model, inputs, source)
    except lc.LiftError as error:
        _named(error, drawn)
        return {"refused": 1}
    try:
        _compare(lifted, model, seed)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{drawn.source}") from error
    counts = {"whole": int(_larger(lifted, drawn.source)), "stages": len(lifted.stages), "lifted": 1}
    if seed % 4:
        return counts
    try:
        return {**counts, **use(lifted, model, drawn.source, tuple(values_of(6, seed)))}
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{drawn.source}") from error


def _larger(lifted: lc.Lifted, source: str) -> bool:
    """Whether a part was kept whole that is larger than its cause: a module, or more than the branches of a mode."""
    assert lifted.receipt is not None
    branches = [p for p in lifted.network.capture.module.modules() if isinstance(p, ByMode)]
    most = max((_operations(m) for p in branches for m in (p.in_train, p.in_eval)), default=0)
    return bool(lifted.receipt.whole) or most > BRANCH * source.count("if self.training:")


def _operations(module: nn.Module) -> int:
    graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
    return sum(n.op.startswith("call") for g in graphs for n in g.nodes)


def valid(seed: int) -> tuple[Drawn, nn.Module, random.Random]:
    """The first module from a seed that PyTorch itself can run forwards and backwards."""
    source = random.Random(seed)
    for number in range(100):
        drawn = draw(source, f"drawn_{seed}_{number}.py")
        torch.manual_seed(seed)
        model = drawn.build().double()
        try:
            for training, size in ((True, 4), (False, 2), (False, 1)):
                outcome(model, model.train(training), values_of(size, seed), seed)
        except (RuntimeError, IndexError, ValueError, AttributeError):
            continue
        torch.manual_seed(seed)
        return drawn, drawn.build().double(), source
    raise AssertionError(f"seed {seed} gives no module that runs")


def values_of(size: int, seed: int) -> list[Tensor]:
    """Inputs of a batch size."""
    generator = torch.Generator().manual_seed(seed * 31 + size)
    return [torch.randn(size, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


def flat(output: Any, place: str = "output") -> Iterator[tuple[str, Any]]:
    """Leaves of an output with their places; a place tells the containers around it."""
    if isinstance(output, tuple | list | Mapping | Record):
        keyed = vars(output) if isinstance(output, Record) else output
        items = keyed.items() if isinstance(keyed, Mapping) else enumerate(keyed)
        for key, value in items:
            yield from flat(value, f"{place} {type(output).__name__}[{key}]")
    else:
        yield place, output


def outcome(owner: nn.Module, forward: Any, inputs: list[Tensor], seed: int) -> dict[str, Any]:
    """All that a call can be told by: outputs, gradients, buffers, the generator."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    given = [t.clone() for t in leaves]
    torch.manual_seed(seed)
    output = forward(*given)
    state = torch.get_rng_state()
    parts = list(flat(output))
    found = [t for _, t in parts if isinstance(t, Tensor)]
    names = [n for n, _ in owner.named_parameters()]
    wanted = [*leaves, *owner.parameters()]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]
    loss: Any = sum(((i + 1.0) * torch.sin(t + 0.1 * i)).sum() for i, t in enumerate(real) if t.is_floating_point())
    gradients: tuple[Tensor | None, ...] = (None,) * len(wanted)
    if getattr(loss, "requires_grad", False):
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return {
        "form": [(place, None if isinstance(v, Tensor) else v) for place, v in parts],
        "outputs": [t.detach().clone() for t in found],
        "gradients": {
            n: torch.zeros_like(w) if g is None else g
            for n, w, g in zip(("x", "y", *names), wanted, gradients, strict=True)
        },
        "buffers": {n: b.clone() for n, b in owner.named_buffers()},
        "random": state,
        "given": [g.detach().clone() for g in given],
    }


def _lift(model: nn.Module, inputs: list[Tensor], source: random.Random) -> lc.Lifted:
    """Lift with a split that is drawn; one that is refused must really be impossible."""
    wanted = source.choice((1, 2, 2, 3, 4, 6, 10))
    try:
        lifted = lc.lift(model, tuple(inputs), split=wanted)
    except lc.SplitError as refusal:
        wanted = _most(refusal, _cuts_of(lc.lift(model, tuple(inputs), split=1), inputs), wanted)
        lifted = lc.lift(model, tuple(inputs), split=wanted)
    assert len(lifted.stages) == wanted, f"{len(lifted.stages)} stages, not {wanted}"
    if source.random() < 0.2 and lifted.graph.staged:
        node = source.choice(lifted.graph.staged).name
        try:
            return lc.lift(model, tuple(inputs), split={"policy": "at", "after": [f"node:{node}"]})
        except lc.SplitError as refusal:
            _placed(refusal, _cuts_of(lifted, inputs), node)
    return lifted


def _cuts_of(lifted: lc.Lifted, inputs: list[Tensor]) -> Cuts:
    return cuts(lifted.network.capture.module, inputs)


def _most(refusal: lc.SplitError, found: Cuts, wanted: int) -> int:
    """The number of stages that it says would work: no fewer than there are places for."""
    least, most = len(found.places) + 1, refusal.most or 0
    assert least <= most < wanted, f"{refusal}, although there are {least - 1} places"
    return most


def _placed(refusal: lc.SplitError, found: Cuts, node: str) -> None:
    """It names what was asked for, or a value in the way that really is no state."""
    text = str(refusal)
    named = text.partition("'")[2].partition("'")[0]
    in_the_way = "cannot be a state" in text and named in found.values and not found.floating(named)
    assert node in text or "separates nothing" in text or in_the_way, text


def _named(error: lc.LiftError, drawn: Drawn) -> None:
    text = str(error)
    assert ".py:" in text or "'" in text, f"a refusal without a place: {text}\n{drawn.source}"


def _compare(lifted: lc.Lifted, model: nn.Module, seed: int) -> None:
    for size, training, moved in ((4, True, 0.0), (2, False, 0.0), (5, True, 0.1), (3, False, 0.1), (1, False, 0.0)):
        generator = torch.Generator().manual_seed(seed)
        own = dict(lifted.module.named_parameters())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(moved * torch.randn(p.shape, generator=generator, dtype=p.dtype))
                own[name].copy_(p)
        inputs = values_of(size, seed)
        expected = outcome(model, model.train(training), inputs, seed)
        lifted.train(training)
        got = outcome(lifted.module, lifted, inputs, seed)
        where = f"batch {size}, {'train' if training else 'eval'}, weights moved by {moved}"
        _equal(expected, got, inputs, where)


def _equal(expected: Mapping[str, Any], got: Mapping[str, Any], inputs: list[Tensor], where: str) -> None:
    assert got["form"] == expected["form"], f"{where}: output {got['form']}, not {expected['form']}"
    assert len(got["outputs"]) == len(expected["outputs"]), where
    for i, (a, b) in enumerate(zip(expected["outputs"], got["outputs"], strict=True)):
        assert _close(a, b), f"{where}: output {i} is off by {_off(a, b)}"
    for part in ("gradients", "buffers"):
        for name, a in expected[part].items():
            assert _close(a, got[part][name]), f"{where}: {part} of {name} off by {_off(a, got[part][name])}"
    assert torch.equal(expected["random"], got["random"]), f"{where}: another state of the random generator"
    for a, b in zip(inputs, got["given"], strict=True):
        assert torch.equal(a, b), f"{where}: the user's input was written into"


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, _TOLERANCE, _TOLERANCE, equal_nan=True)


def _off(a: Tensor, b: Tensor) -> str:
    return f"{(a - b).abs().max():.1e}" if a.shape == b.shape and a.numel() else f"{a.shape} against {b.shape}"


warnings.filterwarnings("ignore", message=".*resized.*", category=UserWarning)
