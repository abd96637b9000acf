"""Nothing runs that was not asked for: hostile specs on every command, and the ways in which a person allows code."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

import lagcompile as lc
from lagcompile.workbench.cli import main
from tests.workbench import hostile
from tests.workbench.hostile import CANARY, COMMANDS, DATA, MODEL, MODULE, SECRET, SPLIT, constrained, run, spec
from tests.workbench.specs import moons

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
IDS = [" ".join(c) for c in COMMANDS]
AT_1 = (SPLIT, "{policy: at, after: ['1']}")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: Patch) -> Iterator[None]:
    project = tmp_path / "project"
    project.mkdir()
    moons(project)
    monkeypatch.chdir(project)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("zz_"):
            del sys.modules[name]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return tmp_path / "project"


HOSTILE = {
    "a command as data": [(DATA, "{name: 'subprocess:check_output', args: {args: [touch, canary]}}")],
    "a command as model": [(MODEL, "{name: 'os:system', args: {command: touch canary}}")],
    "eval as loss": [("data:", "loss: 'builtins:eval'\ndata:")],
    "a constraint's function": [constrained("zz_beside:rule")],
    "a standard constraint's function": [constrained("os:system")],
    "a module beside the spec": [(MODEL, "{name: 'zz_beside:net'}")],
    "a package beside the spec": [(DATA, "{name: 'zz_folder.inner:data'}")],
    "pickles": [(DATA, "{name: 'torch:load', args: {f: evil.pt}}")],
    "pickled arrays": [(DATA, "{name: 'numpy:load', args: {file: evil.npy, allow_pickle: true}}")],
    "a hub": [(MODEL, "{name: 'torch.hub:load', args: {repo_or_dir: ., model: net, source: local}}")],
    "globals": [(MODEL, "{name: 'torch:nn.Module.__init__.__globals__'}")],
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_nothing_runs_that_was_not_asked_for(
    command: tuple[str, ...], what: str, project: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    (project / "zz_beside.py").write_text(MODULE)
    (project / "zz_folder").mkdir()
    (project / "zz_folder" / "inner.py").write_text(MODULE)
    (project / "hubconf.py").write_text(MODULE)
    path = spec(project, *HOSTILE[what])
    before = hostile.files(project)
    assert run(monkeypatch, command, path) == 2
    said = capsys.readouterr()
    (problem,) = said.err.splitlines()
    assert problem.startswith(f"{path}:"), problem
    assert said.out == ""
    assert hostile.files(project) == before
    assert not {"zz_beside", "zz_folder", "hubconf"} & set(sys.modules)


@pytest.mark.parametrize("command", [("show",), ("solve", "--steps", "1", "--quiet"), ("export", "--draw", "x.svg")])
def test_what_lies_beside_a_spec_is_not_imported(
    command: tuple[str, ...], project: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    for name in ("sklearn", "scipy", "matplotlib", "queue", "zz_own"):
        (project / name).mkdir()
        (project / name / "__init__.py").write_text(MODULE)
    (project / "PIL.py").write_text(MODULE)
    (project / "json.py").write_text(MODULE)
    data = (DATA, "{name: digits, args: {train_limit: 40}}")
    path = spec(project, data, ("[2, 8, 8, 2]", "[64, 8, 8, 10]"))
    with monkeypatch.context() as patch:
        for name in ("sklearn", "sklearn.datasets"):
            patch.delitem(sys.modules, name, raising=False)
        patch.setattr(sys, "path", ["", str(project), *sys.path])  # as `python -m` in that folder has it
        run(patch, command, path)
    assert CANARY not in "\n".join(hostile.files(project)), capsys.readouterr().err


@pytest.mark.parametrize("allowed", [["--trust", "zz_beside"], ["--trust", "zz_beside.py"], "folder", "above"])
def test_what_a_person_allows_runs(
    allowed: list[str] | str, project: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    (project / "zz_beside.py").write_text(MODULE)
    names = [
        (MODEL, "{name: 'zz_beside:net'}"),
        (DATA, "{name: 'zz_beside:data'}"),
        AT_1,
    ]
    path = spec(project, *names, ("data:", "loss: zz_beside:loss\ndata:"))
    assert run(monkeypatch, ("show",), path) == 2
    refused = capsys.readouterr().err.splitlines()
    assert len(refused) == 3
    assert refused[0] == (
        f"{path}:3: model.name: 'zz_beside:net' is not built in; it runs only if you trust it: --trust zz_beside for "
        f"this call, or `lagcompile trust {project}` for that folder"
    )
    if isinstance(allowed, str):
        place = project if allowed == "folder" else project.parent
        assert run(monkeypatch, ("trust",), place) == 0
        assert f"{place} is trusted" in capsys.readouterr().out
        allowed = []
    for command in COMMANDS if allowed == ["--trust", "zz_beside"] else COMMANDS[:1]:
        if "--exact" not in command:
            status = run(monkeypatch, command, path, *allowed)
            assert status in {0, 1}, capsys.readouterr().err


def test_a_folder_is_trusted_where_it_stands(
    project: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    (project / "zz_beside.py").write_text(MODULE)
    path = spec(project, (MODEL, "{name: 'zz_beside:net'}"), AT_1)
    assert run(monkeypatch, ("trust",), ".") == 0
    assert run(monkeypatch, ("show",), path) == 0
    file = tmp_path / "config" / "lagcompile" / "trusted.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()) == {"folders": [str(project)]}
    capsys.readouterr()
    assert run(monkeypatch, ("trust",), "--") == 0
    assert capsys.readouterr().out == f"{project}\n"

    shutil.copytree(project, tmp_path / "project2")  # a longer name is another folder
    monkeypatch.chdir(tmp_path / "project2")
    assert run(monkeypatch, ("show",), "x.yaml") == 2
    Path("zz_beside.py").unlink()  # nor does a spec there reach what is trusted
    assert run(monkeypatch, ("show",), "x.yaml") == 2

    moved = tmp_path / "moved"
    project.rename(moved)
    monkeypatch.chdir(moved)
    assert run(monkeypatch, ("show",), "x.yaml") == 2
    project.symlink_to(moved)  # the place counts, not the way to it
    assert run(monkeypatch, ("show",), project / "x.yaml") == 2
    project.unlink()
    moved.rename(project)
    monkeypatch.chdir(project)
    assert run(monkeypatch, ("show",), "x.yaml") == 0
    file.chmod(0o666)
    capsys.readouterr()
    assert run(monkeypatch, ("show",), "x.yaml") == 2
    assert "can be written by others" in capsys.readouterr().err
    file.chmod(0o600)
    assert run(monkeypatch, ("trust",), ".", "--remove") == 0
    assert run(monkeypatch, ("show",), "x.yaml") == 2
    assert run(monkeypatch, ("trust",), ".", "--remove") == 2


def test_what_cannot_be_trusted(tmp_path: Path, monkeypatch: Patch, capsys: Captured) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for place, word in (("/", "holds everything"), (tmp_path / "none", "no folder"), (tmp_path / "open", "anybody")):
        assert run(monkeypatch, ("trust",), str(place)) == 2
        assert word in capsys.readouterr().err
    for name in ("a b", "../x", "x;y", "", "torch:load"):
        assert run(monkeypatch, ("show",), "moons.yaml", "--trust", name) == 2
        assert f"--trust {name}: expected a module" in capsys.readouterr().err
    config = tmp_path / "config" / "lagcompile"
    config.mkdir(parents=True)
    for text in ("", "[", "{}", '{"folders": 3}', '{"folders": ["."]}', "[" * 100_000):
        (config / "trusted.json").write_text(text)
        assert run(monkeypatch, ("show",), "moons.yaml") == 2
        assert "then trust folders anew" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["none", "file", "device", "pipe"])
def test_who_can_have_no_configuration_has_trusted_nothing(
    kind: str, project: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    if kind == "none":
        monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    elif kind == "file":
        (tmp_path / "home").write_text("")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    elif kind == "device":
        monkeypatch.setenv("HOME", os.devnull)
    else:
        (tmp_path / "home/.config/lagcompile").mkdir(parents=True)
        os.mkfifo(tmp_path / "home/.config/lagcompile/trusted.json", 0o600)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wanted = 2 if kind == "pipe" else 0  # a file that is no list of folders is told, as before
    assert run(monkeypatch, ("show",), spec(project)) == wanted
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["lagcompile", "trust", str(project)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_relative_configuration_is_not_the_persons(project: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    (project / "zz_beside.py").write_text(MODULE)
    (project / "config" / "lagcompile").mkdir(parents=True)
    (project / "config" / "lagcompile" / "trusted.json").write_text(json.dumps({"folders": [str(project)]}))
    (project / "config" / "lagcompile" / "trusted.json").chmod(0o600)
    monkeypatch.setenv("XDG_CONFIG_HOME", "config")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(monkeypatch, ("show",), spec(project, (MODEL, "{name: 'zz_beside:net'}"))) == 2


REACHED = {
    "zz_vision.models:os": "is a module, expected a class or a function",
    "zz_vision.models:os.system": "comes from os, which no trust covers",
    "zz_vision.models:torch.load": "comes from torch; it runs only if you trust it: --trust torch",
    "zz_vision.models:resnet.torch.hub.load": "comes from torch",
    "zz_vision.models:resnet18.__globals__": "names that begin with __",
    "zz_vision.models:resnet18.__wrapped__": "names that begin with __",
    "zz_vision.models:load_state_dict_from_url": "comes from torch.hub",
    "zz_vision.models:partial": "comes from functools",
    "zz_visi\u043en.models:resnet18": "is not of the form package.module:name",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A package on the import path that is made as torchvision is."""
    models = tmp_path / "site" / "zz_vision" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text("from zz_vision import models\n")
    (models / "__init__.py").write_text(
        "import os, torch\nfrom functools import partial\nfrom torch.hub import load_state_dict_from_url\n"
        "from zz_vision.models import resnet\nfrom zz_vision.models.resnet import resnet18\n"
    )
    (models / "resnet.py").write_text(
        "import functools, torch\ndef _named(f):\n    @functools.wraps(f)\n    def call(*args, **kwargs):\n"
        "        return f(*args, **kwargs)\n    return call\n"
        "@_named\ndef resnet18(width=4):\n"
        "    return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(models.parents[1])])
    return models.parents[1]


def test_reexports_of_a_trusted_package_work(project: Path, installed: Path, monkeypatch: Patch) -> None:
    path = spec(project, (MODEL, "{name: 'zz_vision.models:resnet18', args: {width: 6}}"), AT_1)
    assert run(monkeypatch, ("show",), path) == 2
    assert run(monkeypatch, ("show",), path, "--trust", "zz_vision") == 0
    assert run(monkeypatch, ("show",), path, "--trust", "zz_vision.models") == 0
    assert run(monkeypatch, ("show",), path, "--trust", "zz_vision.transforms") == 2
    assert run(monkeypatch, ("trust",), ".") == 0
    assert run(monkeypatch, ("show",), path, "--trust", "zz_vision") == 0


@pytest.mark.parametrize(
    "name",
    ["zz_vision.models:resnet18", "typer:run", "yaml:unsafe_load", "scipy.io:loadmat", "beside:resnet18", "beside:run"],
)
def test_a_trusted_folder_covers_its_own_modules_and_no_installed_package(
    name: str, project: Path, installed: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    (project / "beside.py").write_text("from typer import run\nfrom zz_vision.models import resnet18\n" + MODULE)
    assert run(monkeypatch, ("trust",), ".") == 0
    path = spec(project, (MODEL, f"{{name: '{name}'}}"), AT_1)
    capsys.readouterr()
    assert run(monkeypatch, ("show",), path) == 2
    said = capsys.readouterr().err
    assert "a trusted folder covers its own modules; --trust " in said or "there is no module 'yaml'" in said, said
    own = spec(project, (MODEL, "{name: 'beside:net'}"), AT_1)
    assert run(monkeypatch, ("show",), own) == 0


@pytest.mark.parametrize("name", REACHED)
def test_a_trusted_package_gives_only_its_own(
    name: str, project: Path, installed: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    path = spec(project, (MODEL, f"{{name: '{name}'}}"))
    assert run(monkeypatch, ("show",), path, "--trust", "zz_vision") == 2
    (problem,) = capsys.readouterr().err.splitlines()
    assert REACHED[name] in problem


TORCH = [
    "torch:load",
    "torch:hub.load",
    "torch.hub:load",
    "torch.jit:load",
    "torch.export:load",
    "torch:from_file",
    "torch:import_ir_module",
    "torch:set_default_dtype",
    "torch:ops.load_library",
    "torch.utils.cpp_extension:load",
    "torch.utils.collect_env:run",
    "torch.nn.functional:torch.load",
    "torch:compile",
    "numpy:load",
    "numpy:memmap",
]


@pytest.mark.parametrize("name", TORCH)
def test_torch_gives_networks_not_loaders(name: str, project: Path, monkeypatch: Patch, capsys: Captured) -> None:
    path = spec(project, (MODEL, f"{{name: '{name}'}}"))
    assert run(monkeypatch, ("show",), path, "--trust", "torch", "--trust", "numpy") == 2
    (problem,) = capsys.readouterr().err.splitlines()
    assert "of torch a file names layers, losses and operations only" in problem or "of numpy a file names nothing" in (
        problem
    )


def test_torch_gives_layers_and_losses(project: Path, monkeypatch: Patch) -> None:
    layer = (MODEL, "{name: 'torch.nn:Linear', args: {in_features: 2, out_features: 2}}")
    path = spec(
        project, layer, (SPLIT, "{policy: none}"), ("data:", "loss: 'torch.nn.functional:multi_margin_loss'\ndata:")
    )
    assert run(monkeypatch, ("show",), path) == 2
    assert run(monkeypatch, ("show",), path, "--trust", "torch") == 0


def test_a_built_in_by_its_long_name(project: Path, monkeypatch: Patch) -> None:
    path = spec(project, ("name: mlp", "name: lagcompile.workbench.models:MLP"))
    assert run(monkeypatch, ("show",), path) == 0
    path = spec(project, ("name: mlp", "name: lagcompile.workbench.models:torch.load"))
    assert run(monkeypatch, ("show",), path) == 2


def test_reexports_partials_and_instances_come_from_where_they_were_made(
    project: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    (project / "zz_beside.py").write_text(
        MODULE
        + "import functools, os, subprocess\n"
        + "from torch import load\n"
        + "partly = functools.partial(net)\n"
        + "command = functools.partial(os.system, 'touch canary2')\n"
        + "class Loss:\n    def __call__(self, output, target):\n        return loss(output, target)\n"
        + "instance = Loss()\nmeasure = torch.nn.CrossEntropyLoss()\n"
    )
    fixed = [AT_1]
    good = spec(project, (MODEL, "{name: 'zz_beside:partly'}"), *fixed, ("data:", "loss: 'zz_beside:instance'\ndata:"))
    assert run(monkeypatch, ("show",), good, "--trust", "zz_beside") == 0, capsys.readouterr().err
    other = spec(project, ("data:", "loss: 'zz_beside:measure'\ndata:"))
    assert run(monkeypatch, ("show",), other, "--trust", "zz_beside") == 2
    assert "comes from torch.nn.modules.loss; it runs only if you trust it: --trust torch" in capsys.readouterr().err
    assert run(monkeypatch, ("show",), other, "--trust", "zz_beside", "--trust", "torch") == 0
    for name in ("command", "subprocess.run", "os.system", "load", "loss.__globals__"):
        bad = spec(project, (MODEL, f"{{name: 'zz_beside:{name}'}}"))
        assert run(monkeypatch, ("show",), bad, "--trust", "zz_beside", "--trust", "torch") == 2
    assert not (project / "canary2").exists()


def test_each_spec_gets_the_module_beside_it(project: Path, monkeypatch: Patch, capsys: Captured) -> None:
    for name, width in (("one", 4), ("two", 6)):
        (project / name).mkdir()
        (project / name / "zz_same.py").write_text(MODULE.replace("4", str(width)))
        spec(project / name, (MODEL, "{name: 'zz_same:net'}"), AT_1)
    assert run(monkeypatch, ("diff", "two/x.yaml"), "one/x.yaml", "--trust", "zz_same") == 0
    said = capsys.readouterr().out
    assert "[4, 2]" in said
    assert "[6, 2]" in said


def test_an_installed_package_is_not_shadowed(
    project: Path, installed: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    (project / "zz_vision").mkdir()
    (project / "zz_vision" / "__init__.py").write_text(MODULE)
    (project / "queue.py").write_text(MODULE)
    path = spec(project, (MODEL, "{name: 'zz_vision.models:resnet18'}"))
    path.write_text(path.read_text().replace(SPLIT, "{policy: none}"))
    assert run(monkeypatch, ("show",), path, "--trust", "zz_vision") == 0, capsys.readouterr().err
    assert run(monkeypatch, ("show",), path, "--trust", "./zz_vision") == 2
    assert "has the name of an installed package" in capsys.readouterr().err
    assert run(monkeypatch, ("trust",), ".") == 0
    assert run(monkeypatch, ("show",), path) == 2
    assert run(monkeypatch, ("show",), path, "--trust", "zz_vision") == 0
    own = spec(project, (MODEL, "{name: 'queue:net'}"))
    assert run(monkeypatch, ("show",), own, "--trust", "queue") == 2
    assert "a module of your own needs another name" in capsys.readouterr().err
    assert not (project / CANARY).exists()


def test_a_link_out_of_a_trusted_folder(project: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured) -> None:
    (tmp_path / "zz_outside.py").write_text(MODULE)
    (project / "zz_link.py").symlink_to(tmp_path / "zz_outside.py")
    path = spec(project, (MODEL, "{name: 'zz_link:net'}"))
    assert run(monkeypatch, ("trust",), ".") == 0
    assert run(monkeypatch, ("show",), path) == 2
    assert "outside the trusted folder" in capsys.readouterr().err
    assert not (tmp_path / CANARY).exists()


def test_a_folder_that_is_trusted_does_not_trust_where_one_stands(
    project: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    assert run(monkeypatch, ("trust",), ".") == 0
    path = spec(project, (MODEL, "{name: 'zz_here:net'}"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "zz_here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(monkeypatch, ("show",), path) == 2
    assert not (tmp_path / "elsewhere" / CANARY).exists()


OUTSIDE = [
    "../secret.yaml",
    "{abs}",
    "link.yaml",
    "folder/secret.yaml",
    "../project/../secret.yaml",
    "sub/../../secret.yaml",
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_split_files_stay_beside_the_spec(
    command: tuple[str, ...], path: str, project: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text(f"split: {{policy: at, after: [{SECRET}]}}\n")
    (project / "link.yaml").symlink_to(secret)
    (project / "folder").symlink_to(tmp_path)
    (project / "sub").mkdir()
    given = spec(project, (SPLIT, path.format(abs=secret)))
    assert run(monkeypatch, command, given) == 2
    said = capsys.readouterr()
    assert "leads out of this file's folder" in said.err
    assert SECRET not in said.err + said.out


FOREIGN = [
    f"root:x:0:0:{SECRET}:/root:/bin/sh\nadmin:x:1:{SECRET}\n",
    f"{SECRET}\n",
    f"- {SECRET}\n",
    f"name: {SECRET}\ndata: {{password: {SECRET}}}\n{SECRET}: 1\n",
    f"a: *{SECRET}\n",
    f"a: !{SECRET} 1\n",
    f"key: [{SECRET}\n",
    f'{{"private_key": "{SECRET}", "{SECRET}": 3}}',
    f"%{SECRET}\n---\n",
    f"split_key: {SECRET}\nkind: Secret\n",
]


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("suffix", ["yaml", "json", "pem"])
def test_other_files_are_never_shown(
    text: str, suffix: str, project: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    foreign = project / f"foreign.{suffix}"
    foreign.write_text(text)
    by_split = spec(project, (SPLIT, foreign.name))
    commands = COMMANDS if suffix == "yaml" else (("show",), ("diff", "moons.yaml"))
    calls: list[tuple[tuple[str, ...], Path]] = [(c, p) for c in commands for p in (foreign, by_split)]
    calls += [(("diff", str(foreign)), project / "moons.yaml"), (("verify", "--against", str(foreign)), by_split)]
    calls += [(("verify", "--against", str(foreign)), project / "moons.yaml")]
    for command, path in calls:
        assert run(monkeypatch, command, path) == 2
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err, said.err
        assert str(foreign.name) in said.err


@pytest.mark.parametrize("name", ["../../x", "/abs", "a/b", "..", ".x", "", "a\\0b", "x" * 300, "a\\nb"])
def test_a_name_is_the_name_of_a_folder(name: str, project: Path, monkeypatch: Patch, capsys: Captured) -> None:
    shooting = Path(__file__).parents[2] / "specs" / "shooting" / "logistic.yaml"
    lines = shooting.read_text().splitlines()
    lines = [f'name: "{name}"' if line.startswith("name:") else line for line in lines]
    (project / "s.yaml").write_text("\n".join(lines))
    before = hostile.files(project.parent)
    for path in (project / "s.yaml", spec(project, ("name: moons", f'name: "{name}"'))):
        assert run(monkeypatch, ("solve", "--steps", "1"), path) == 2
        assert "name: expected a name of up to 100 letters, digits" in capsys.readouterr().err
    assert hostile.files(project.parent) - before == {"project/x.yaml"}


def test_links_do_not_lead_a_run_out(project: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured) -> None:
    (tmp_path / "outside").mkdir()
    (project / "runs").symlink_to(tmp_path / "outside")
    assert run(monkeypatch, ("solve", "--steps", "1", "--quiet"), "moons.yaml") == 2
    assert "name that folder with --out" in capsys.readouterr().err
    assert not hostile.files(tmp_path / "outside")
    (project / "runs").unlink()
    (project / "runs").mkdir()
    (project / "runs" / "moons").symlink_to(tmp_path / "outside" / "made")
    assert run(monkeypatch, ("solve", "--steps", "1", "--quiet"), "moons.yaml") == 2
    assert run(monkeypatch, ("solve", "--steps", "1", "--quiet", "--force"), "moons.yaml") == 2
    assert not hostile.files(tmp_path / "outside")
    assert run(monkeypatch, ("solve", "--steps", "1", "--quiet", "--out", "mine"), "moons.yaml") == 0


@pytest.mark.parametrize("path", ["../out", "{abs}", "link"])
def test_exported_models_stay_beside_the_spec(
    path: str, project: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    (project / "link").symlink_to(tmp_path / "out")
    given = spec(project, (MODEL, f"{{name: exported, args: {{folder: '{path.format(abs=tmp_path / 'out')}'}}}}"))
    assert run(monkeypatch, ("show",), given) == 2
    assert "model.args.folder" in (said := capsys.readouterr().err)
    assert "leads out of this file's folder" in said


def test_a_program_names_what_it_has_imported_itself() -> None:
    with pytest.raises(lc.ProgramError, match="import zz_nowhere first"):
        _solved("zz_nowhere:rule")
    with pytest.raises(lc.ProgramError, match="standard library"):
        _solved("os:system")
    assert _solved(f"{__name__}:above").status is lc.Status.SOLVED


def above(h: object) -> object:
    return -1.0 - h * h  # type: ignore[operator]


def _solved(function: str) -> lc.Solution:
    import torch

    constraint = lc.ValueConstraint(name="rule", reads=("h1",), function=function)
    small = lc.Formulation(
        constraints=(constraint,), regularisers=(lc.Regulariser(kind="l2", on="weights", weight=1.0),)
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Tanh(), torch.nn.Linear(1, 1))
    lifted = lc.lift(model, torch.ones(2, 1), split=2, formulation=small)
    return lifted.solve((torch.ones(2, 1), torch.ones(2, 1)), loss=torch.nn.functional.mse_loss, method=lc.SQP())


def test_bench_and_schema_name_nothing_of_a_folder(project: Path, monkeypatch: Patch) -> None:
    for name in ("sklearn", "optuna", "zz_models"):
        (project / name).mkdir()
        (project / name / "__init__.py").write_text(MODULE)
    for arguments in (["schema"], ["bench", "table1", "--data", "zz_models:data"]):
        monkeypatch.setattr(sys, "argv", ["lagcompile", *arguments])
        with pytest.raises(SystemExit):
            main()
    assert CANARY not in "\n".join(hostile.files(project))
    assert os.getcwd() == str(project)
