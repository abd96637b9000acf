"""Records behave: an addition edits as few files as it should, every reader knows it, and none takes a stranger."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from lagcompile.ir.axes import LAYOUTS, LayoutName, Start, Weight
from lagcompile.ir.base import Frozen
from lagcompile.ir.domains import Domain, Free
from lagcompile.ir.storages import Storage
from lagcompile.ir.transforms import Transform
from lagcompile.runtime.domains import inside
from lagcompile.runtime.storages import keeping
from lagcompile.runtime.transforms import behaviour
from lagcompile.workbench.methods import MethodSpec
from tests.extension import METHOD, RULE, STORAGE, TRANSFORM, extended


def test_an_addition_edits_two_files_and_a_step_rule_one() -> None:
    assert [len(edits) for edits in (TRANSFORM, STORAGE, RULE, METHOD)] == [2, 2, 1, 2]


def test_every_reader_knows_what_was_added(tmp_path: Path) -> None:
    folder = extended(tmp_path)
    script = Path(__file__).with_name("extension_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("all readers know them\n"), done.stderr[-3000:]


def kinds(union: Any) -> list[type[Frozen]]:
    return list(get_args(get_args(union)[0]))


NEEDED: dict[str, Any] = {"epsilon": 0.1, "lower": -1.0, "upper": 1.0}


def example(kind: type[Frozen]) -> Any:
    return kind(**{n: NEEDED[n] for n, f in kind.model_fields.items() if f.is_required()})


def test_each_record_of_a_union_is_known() -> None:
    assert all(behaviour(example(kind)) for kind in kinds(Transform))
    assert all(keeping(example(kind), Free()) for kind in kinds(Storage))
    assert all(inside(example(kind)) for kind in kinds(Domain))
    assert set(LAYOUTS) == set(get_args(LayoutName))


class Stranger(Frozen):
    """A record that looks like others and is in no union."""

    kind: str = "table"
    epsilon: float = 0.1


@pytest.mark.parametrize("known", [behaviour, inside, lambda record: keeping(record, Free())])
def test_a_record_that_a_reader_does_not_know_raises(known: Any) -> None:
    with pytest.raises(AssertionError, match="unreachable"):
        known(Stranger())


def test_nobody_asks_for_the_class_of_a_record_or_a_method() -> None:
    room = Path(__file__).parent.parent / "lagcompile"
    names = {k.__name__ for union in (Transform, Storage, Domain, Weight, Start, MethodSpec) for k in kinds(union)}
    names |= {"SGD", "Adagrad", "Adam", "FirstOrder", "Method"}
    found = []
    for path in room.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & names
                found += [f"{path.relative_to(room)}:{node.lineno} asks for {', '.join(asked)}"] if asked else []
    assert not found
