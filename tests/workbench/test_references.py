"""Names in a spec to objects: short names, a user's modules, and every name that does not resolve, at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lagcompile.ir.base import SpecError
from lagcompile.ir.trust import Scope, trusting
from lagcompile.workbench import data, models
from lagcompile.workbench.references import (
    DATA,
    LOSSES,
    MODELS,
    Wanted,
    option_problems,
    resolve,
    resolve_all,
)

SOURCE = """
import torch

class MyNet(torch.nn.Linear):
    class Inner(torch.nn.Linear):
        pass

    @classmethod
    def tiny(cls):
        return cls(1, 1)

def my_data(*, seed=0, size):
    return seed, size

CONSTANT = 3
"""


@pytest.fixture
def user_modules(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "zz_user_nets.py").write_text(SOURCE)
    (tmp_path / "zz_user_broken.py").write_text("x = 1\nraise RuntimeError('no luck')\n")
    (tmp_path / "zz_user_needs.py").write_text("import zz_user_absent\n")
    (tmp_path / "zz_user_exits.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "zz_user_package").mkdir()
    (tmp_path / "zz_user_package" / "__init__.py").write_text("")
    (tmp_path / "zz_user_package" / "deep.py").write_text("def build(): return 1\n")
    before = list(sys.path)
    with trusting(Scope(roots=(tmp_path,), inside=tmp_path, home=tmp_path)):
        assert sys.path[-1] == str(tmp_path), "behind what is installed"
        yield tmp_path
    assert sys.path == before
    for name in [name for name in sys.modules if name.startswith("zz_user")]:
        del sys.modules[name]


def problem(name: str) -> str:
    with pytest.raises(SpecError) as caught:
        resolve(name, MODELS, place="x.yaml:3: model")
    (only,) = caught.value.problems
    assert only.startswith("x.yaml:3: model: ")
    return only.removeprefix("x.yaml:3: model: ")


def test_short_names() -> None:
    assert resolve("mnist_convnet", MODELS, place="") is models.MnistConvNet
    assert resolve("digits", DATA, place="") is data.digits
    assert set(LOSSES) >= {"cross_entropy", "mse"}


def test_a_users_own_names(user_modules: Path) -> None:
    assert resolve("zz_user_nets:MyNet", MODELS, place="").__name__ == "MyNet"
    assert resolve("zz_user_nets:MyNet.Inner", MODELS, place="").__name__ == "Inner"
    assert type(resolve("zz_user_nets:MyNet.tiny", MODELS, place="")()).__name__ == "MyNet"
    assert resolve("zz_user_package.deep:build", MODELS, place="")() == 1


def test_the_path_is_restored_after_an_error(tmp_path: Path) -> None:
    before = list(sys.path)
    with pytest.raises(KeyError), trusting(Scope(roots=(tmp_path,))):
        raise KeyError
    assert sys.path == before


def test_names_that_do_not_resolve(user_modules: Path) -> None:
    names = ", ".join(sorted(MODELS))
    own = "your own is written package.module:name"
    assert problem("mnist_convet") == (
        f"unknown name 'mnist_convet', did you mean 'mnist_convnet'? Known names: {names}; {own}"
    )
    assert problem("qqq") == f"unknown name 'qqq'; known names: {names}; {own}"
    assert problem("a b:c") == "'a b:c' is not of the form package.module:name"
    assert problem("os:") == "'os:' is not of the form package.module:name"
    assert problem("os:system('ls')") == "'os:system('ls')' is not of the form package.module:name"
    assert problem("zz_user_net:MyNet") == "there is no module 'zz_user_net', did you mean 'zz_user_nets'?"
    assert problem("zz_qwertz_19:f") == (
        "there is no module 'zz_qwertz_19' on the import path, beside the file, or where you are"
    )
    assert problem("zz_user_package.dep:build") == "there is no module 'zz_user_package.dep', did you mean 'deep'?"
    assert problem("zz_user_nets.sub:f") == (
        "there is no module 'zz_user_nets.sub': 'zz_user_nets' is a module, not a package"
    )
    assert problem("zz_user_nets:MyNett") == "module 'zz_user_nets' has no 'MyNett', did you mean 'MyNet'?"
    assert problem("zz_user_nets:qqq") == "module 'zz_user_nets' has no 'qqq'; it has: MyNet, my_data"
    assert problem("zz_user_nets:CONSTANT") == "'zz_user_nets:CONSTANT' is a int, expected a class or a function"
    assert problem("zz_user_broken:f") == (
        "importing 'zz_user_broken' failed: RuntimeError: no luck (zz_user_broken.py, line 2)"
    )
    assert problem("zz_user_needs:f") == (
        "importing 'zz_user_needs' failed: ModuleNotFoundError: No module named 'zz_user_absent' "
        "(zz_user_needs.py, line 1)"
    )
    assert problem("zz_user_exits:f") == "importing 'zz_user_exits' failed: SystemExit: bye (zz_user_exits.py, line 2)"


def test_all_problems_at_once(user_modules: Path) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_all(
            [
                Wanted("mnit", DATA, "x.yaml:1: data"),
                Wanted("tanh_net", MODELS, "x.yaml:2: model", {"depht": 3, "width": 2}),
                Wanted("cross_entropy", LOSSES, "x.yaml:3: loss"),
                Wanted("zz_user_nets:my_data", DATA, "x.yaml:4: data", {}),
            ]
        )
    assert caught.value.problems == (
        "x.yaml:1: data: unknown name 'mnit', did you mean 'mnist'? Known names: "
        "cifar10, digits, mnist, regression, two_moons; your own is written package.module:name",
        "x.yaml:2: model: 'tanh_net' has no option 'depht', did you mean 'depth'? "
        "It takes: depth, gain, inputs, outputs, width",
        "x.yaml:2: model: 'tanh_net' needs the option depth",
        "x.yaml:4: data: 'zz_user_nets:my_data' needs the option size",
    )


def test_resolve_all_keeps_the_order() -> None:
    found = resolve_all([Wanted("digits", DATA, ""), Wanted("mlp", MODELS, "", {"widths": [2, 1]})])
    assert found == [data.digits, models.MLP]


def test_callables_that_take_anything() -> None:
    def anything(**options: object) -> None: ...

    assert option_problems(anything, "anything", {"x": 1}) == []
    assert option_problems(lambda: None, "none", {"x": 1}) == ["'none' has no option 'x'; it takes: none"]
