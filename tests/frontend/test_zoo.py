"""Every model of the zoo lifts, unmodified, and what was lifted is the model."""

from __future__ import annotations

import copy
import hashlib
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.frontend.structure import leaves
from lagcompile.ir.program import Program
from tests.coverage import smooth_loss
from tests.frontend.zoo import STOPS, ZOO, Case


def digest(model: nn.Module) -> str:
    """Everything that a model is: tensors, modes, attributes, and the objects that hold them."""
    text = [f"{n} {m.training} {sorted(vars(m))} {type(m)}" for n, m in model.named_modules()]
    text += [f"{n} {id(t)} {t.requires_grad}" for n, t in [*model.named_parameters(), *model.named_buffers()]]
    values = b"".join(t.detach().float().numpy().tobytes() for t in model.state_dict().values())
    return hashlib.sha256("\n".join(text).encode() + values).hexdigest()


def same(a: Any, b: Any) -> bool:
    assert type(a) is type(b)
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def lifted_case(case: Case, stages: lc.AutoSplit | int | None = None) -> tuple[nn.Module, lc.Lifted]:
    torch.manual_seed(0)
    model = case.build()
    return model, lc.lift(model, case.inputs(4), split=stages, example_kwargs=case.kwargs(4))


@pytest.mark.parametrize("name", ZOO)
def test_a_model_lifts_and_is_the_model(name: str) -> None:
    case = ZOO[name]
    torch.manual_seed(0)
    model = case.build()
    before, random = digest(model), torch.get_rng_state()
    inputs = case.inputs(4)
    torch.set_rng_state(random)
    lifted = lc.lift(model, inputs, split=3, example_kwargs=case.kwargs(4))
    assert digest(model) == before
    assert lifted.receipt is not None
    assert lifted.receipt.ok
    assert lifted.receipt.front_end == case.front_end
    assert tuple(dict(lifted.receipt.whole)) == case.whole
    assert lifted.receipt.batch == "dynamic"
    assert len(lifted.stages) == 3
    for batch in (2, 5):  # another batch size than that of the example inputs
        args, kwargs = case.inputs(batch), case.kwargs(batch)
        for training in (False, True):
            twin = copy.deepcopy(model).train(training)
            again = copy.deepcopy(lifted).train(training)
            torch.manual_seed(7)
            expected = twin(*[a.clone() for a in args], **kwargs)
            torch.manual_seed(7)
            assert same(again(*args, **kwargs), expected)
            for key, value in twin.state_dict().items():
                assert torch.equal(again.module.state_dict()[key], value), key


@pytest.mark.parametrize("name", ZOO)
def test_multipliers_are_adjoints(name: str) -> None:
    case = ZOO[name]
    _, lifted = lifted_case(case, 3)
    certificate = lifted.verify(case.inputs(5), None, loss=smooth_loss, kwargs=case.kwargs(5))
    assert certificate.verdict == ("not assessed" if name in STOPS else "ok"), str(certificate)
    assert all(r.ok for r in certificate.residuals)


@pytest.mark.parametrize("name", ZOO)
def test_lifting_twice_gives_one_program(name: str) -> None:
    case = ZOO[name]
    model, first = lifted_case(case, 3)
    second = lc.lift(model, case.inputs(4), split=3, example_kwargs=case.kwargs(4))
    assert second.program == first.program
    assert Program.model_validate_json(first.program.model_dump_json()) == first.program
    saved = lc.lift(model, case.inputs(4), split=first.split, example_kwargs=case.kwargs(4))
    assert saved.program.stages == first.program.stages
    assert saved.program.states == first.program.states


@pytest.mark.parametrize("name", ZOO)
def test_lifted_is_pickled_and_copied(name: str) -> None:
    case = ZOO[name]
    _, lifted = lifted_case(case, 3)
    args, kwargs = case.inputs(3), case.kwargs(3)
    for twin in (pickle.loads(pickle.dumps(lifted)), copy.deepcopy(lifted)):
        assert twin.program == lifted.program
        assert pickle.loads(pickle.dumps(twin.policy)) == lifted.policy
        outputs = []
        for one in (twin, lifted):
            torch.manual_seed(3)
            outputs.append(copy.deepcopy(one).eval()(*args, **kwargs))
        assert same(*outputs)
        assert all(r.ok for r in twin.verify(args, None, loss=smooth_loss, kwargs=kwargs).residuals)


def test_names_and_ties_are_the_users() -> None:
    model, lifted = lifted_case(ZOO["tied transformer"], 4)
    tied = next(w for w in lifted.program.weights if w.aliases)
    assert (tied.name, tied.aliases) == ("token.weight", ("head.weight",))
    names = {w.name for w in lifted.program.weights}
    assert names == {n for n, _ in model.named_parameters()}
    assert {n.module for n in lifted.graph.staged} >= {"token", "layers.0.self_attn", "layers.1.norm2", "head"}
    assert all(n.source for n in lifted.graph.staged if n.op == "call_module")


def test_a_frozen_parameter_is_no_variable() -> None:
    _, lifted = lifted_case(ZOO["frozen"], 2)
    assert {w.name: w.trainable for w in lifted.program.weights} == {
        "features.0.weight": False,
        "features.0.bias": False,
        "features.2.weight": False,
        "features.2.bias": False,
        "head.1.weight": True,
        "head.1.bias": True,
    }
