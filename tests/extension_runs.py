"""What `test_extending` runs in the extended copy: each reader on one program with all four additions."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.check.kkt import certify_kkt
from lagcompile.export.latex import latex
from lagcompile.frontend.lower import Formulation
from lagcompile.ir.text import from_json, from_yaml, to_json, to_yaml
from lagcompile.runtime import kkt
from lagcompile.runtime.transforms import behaviour
from lagcompile.workbench.cli import schema_text
from lagcompile.workbench.prepare import prepare
from lagcompile.workbench.spec import load

SPEC = """\
lagcompile: 1
name: extended
model: {name: mlp, args: {widths: [2, 8, 8, 2], activation: tanh}}
data: {name: two_moons, args: {train: 64, test: 32}}
split: {policy: at, after: [layers.2, layers.4]}
formulation:
  transform: {kind: arsinh}
  storage: {kind: halved}
  weight: {kind: constant, value: 1.0}
method:
  kind: ascent_first
  weights: {kind: sign, lr: 0.01}
  states: {kind: sign, lr: 0.02}
  multipliers: {kind: sgd, lr: 0.1}
run: {steps: 40, batch_size: 16, look_every: 5}
"""


def small(transform: str = "arsinh", storage: str = "halved") -> tuple[lc.Lifted, torch.Tensor, torch.Tensor]:
    """A program small enough for the exact backend."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 3), torch.randn(5, 1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    given = Formulation.model_validate({"transform": {"kind": transform}, "storage": {"kind": storage}})
    return lc.lift(model, (x,), split=2, formulation=given), x, y


def check_spec(folder: Path) -> None:
    """YAML, text, JSON, TeX, schema, plan, and a run with its certificate."""
    path = folder / "extended.yaml"
    path.write_text(SPEC)
    prepared = prepare(load(path))
    program, method = prepared.program, prepared.loaded.spec.method
    printed = str(program)
    assert "arsinh(f1(h1) - h2) == 0" in printed, printed
    assert "float32[N, 8]  halved" in printed, printed
    assert from_json(to_json(program)) == program
    assert from_yaml(to_yaml(program)) == program
    written = latex(program, method)
    for words in (r"\operatorname{arsinh}", "half of it kept for each example", "sign of the mean gradient (step"):
        assert words in written, words
    assert r"\paragraph{Method: ascent first.}" in written
    assert all(f'"const": "{kind}"' in schema_text() for kind in ("arsinh", "halved", "sign", "ascent_first"))
    states, duals = method.slots()
    plan = prepared.lifted.plan(64, state_slots=states, dual_slots=duals)
    assert (states, duals) == (1, 0)
    assert [s.bytes for s in plan.states] == [64 * 8 * 4 * 3] * 2  # states, the rule's mean, multipliers
    assert not list(method.problems(program))
    executor = prepared.executor()
    started, layers = executor.values()[0]["h1"], prepared.lifted.module.layers
    assert isinstance(layers, nn.Sequential)
    torch.testing.assert_close(started, layers[:3](prepared.data.train_x).detach())
    spec = prepared.loaded.spec
    solution = lc.drive(executor, spec.run.options(), original=prepared.model)
    assert solution.status is lc.Status.STEPS_DONE
    first, last = solution.history.rows[0], solution.history.rows[-1]
    assert last["loss"] < first["loss"], (first, last)
    saved = executor.state_dict()
    again = prepared.executor()
    again.load_state_dict(saved)
    for each in (executor, again):
        each.step(torch.arange(16))
    assert torch.equal(executor.values()[0]["h2"], again.values()[0]["h2"])


def check_mathematics() -> None:
    """The force is the gradient of the coupling; half a state takes the steps of a whole one at four times the rate."""
    r = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    multiplier = torch.randn(2, 3, 4, dtype=torch.float64)
    transform = Formulation.model_validate({"transform": {"kind": "arsinh"}}).transform
    g = behaviour(transform).value(r)
    (expected,) = torch.autograd.grad(kkt.coupling(g, multiplier, r, 0.7), r)
    torch.testing.assert_close(kkt.force(g.detach(), multiplier, r.detach(), 0.7, transform), expected)
    found = []
    for storage, rate in (("halved", 0.01), ("table", 0.04)):
        lifted, x, y = small(storage=storage)
        method = lc.Extragradient(states=lc.SGD(lr=rate))
        solution = lifted.solve((x, y), loss=F.mse_loss, method=method, options=lc.RunOptions(steps=5))
        assert solution.certificate is not None
        assert solution.certificate.ok, str(solution.certificate)
        found.append(solution.states["h1"])
    torch.testing.assert_close(*found)


def check_exact() -> None:
    """The exact backend solves the program, and the certificate of its conditions is ok."""
    lifted, x, y = small()
    solution = lifted.solve((x, y), loss=F.mse_loss, method=lc.SQP())
    assert solution.status is lc.Status.SOLVED, solution.status
    conditions = certify_kkt(lifted.bind((x, y), loss=F.mse_loss), solution)
    assert conditions.ok, str(conditions)


if __name__ == "__main__":
    check_spec(Path(sys.argv[1]))
    check_mathematics()
    check_exact()
    print("all readers know them")
