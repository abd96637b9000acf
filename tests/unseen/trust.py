"""Random names of code, and paths, anywhere in a spec: nothing runs, one refusal; or it is allowed, and works."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

from lagcompile.workbench.cli import main
from tests.workbench import hostile
from tests.workbench.hostile import DATA, MODEL, MODULE, SPLIT, constrained

CI, NIGHTLY = 70, 2000
HERE = ["the folder is trusted"]
COMMANDS = (("show",), ("plan",), ("verify",), ("export", "--latex", "out.tex"), ("diff", "good.yaml"))
COMMAND = ["os:system", "os:popen", "subprocess:run", "subprocess:check_output", "builtins:eval", "builtins:exec"]
ARGUMENTS = [
    "command: touch canary",
    "args: [touch, canary]",
    "cmd: touch canary",
    "source: \"open('canary', 'w')\"",
    "",
]
CHAINS = [
    "__globals__",
    "__init__.__globals__",
    "__class__.__mro__",
    "__subclasses__",
    "forward.__globals__",
    "__dict__.get",
    "__wrapped__",
    "__reduce_ex__",
]
TAIL = [
    "torch:nn.Linear",
    "zz_vision.models:resnet18",
    "zz_beside:net",
    "torch.nn:Module",
    "zz_vision:models.resnet.resnet18",
]
INSIDE = [
    "os.system",
    "os",
    "torch.load",
    "torch.hub.load",
    "partial",
    "resnet.functools.partial",
    "resnet.torch.jit.load",
]
ODD = [
    "a b:c",
    "os :system",
    "os:system ",
    ":net",
    "zz_beside:",
    "zz_beside",
    "zz_b\u0435side:net",
    "\uff4f\uff53:system",
    "zz_beside.:net",
    ".zz_beside:net",
    "zz_beside:net:net",
    "../zz_beside:net",
    "zz_besides:net",
    "zz_beside:net()",
    "zz_beside:net\\x1b[2J",
    "/etc/passwd:net",
    "zz_beside\\0:net",
    "-c:net",
    "zz_beside:1net",
    "file:///zz_beside:net",
]
LOADERS = [
    "torch:load",
    "torch.hub:load",
    "torch.jit:load",
    "torch.export:load",
    "torch:from_file",
    "torch:compile",
    "torch.utils.collect_env:run",
    "torch.utils.cpp_extension:load",
    "numpy:load",
    "numpy:fromfile",
    "torch:ops.load_library",
    "torch.package:PackageImporter",
    "torch.serialization:load",
]
PATHS = [
    "../secret.yaml",
    "link.yaml",
    "away/secret.yaml",
    "sub/../../secret.yaml",
    "{abs}",
    "./link.yaml",
    "sub/up.yaml",
    "/etc/passwd",
    "~/x.yaml",
    "a\\0b",
    "",
    "sub/../link.yaml",
    "/proc/self/environ",
    "//etc/passwd",
]
NAMES = [
    "../x",
    "/x",
    "a/b",
    "..",
    ".hidden",
    "",
    "a\\nb",
    "x\\0",
    "-rf",
    "a\\\\..\\\\b",
    " x",
    "x" * 200,
    "\u202ex",
]
VISION = (
    "import functools, os, torch\nfrom functools import partial\nfrom zz_vision.models import resnet\n"
    "from zz_vision.models.resnet import resnet18\n"
)


def _world(root: Path) -> Path:
    """A folder with a good spec, modules beside it and an installed package of the same name as one of them."""
    home, site = root / "home", root / "site"
    for folder in (home / "sub", home / "zz_vision", home / "zz_pack", site / "zz_vision" / "models", root / "other"):
        folder.mkdir(parents=True)
    for module in ("zz_beside.py", "zz_vision/__init__.py", "zz_pack/inner.py", "sklearn.py", "queue.py", "numpy.py"):
        (home / module).write_text(MODULE)
    (root / "zz_outside.py").write_text(MODULE)
    (home / "zz_link.py").symlink_to(root / "zz_outside.py")
    (site / "zz_vision" / "__init__.py").write_text("from zz_vision import models\n")
    (site / "zz_vision" / "models" / "__init__.py").write_text(VISION)
    (site / "zz_vision" / "models" / "resnet.py").write_text(
        "import functools, torch\ndef resnet18(width=4):\n"
        "    return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))\n"
    )
    (root / "secret.yaml").write_text(f"split: {{policy: at, after: [{hostile.SECRET}]}}\n")
    (home / "link.yaml").symlink_to(root / "secret.yaml")
    (home / "sub" / "up.yaml").symlink_to("../../secret.yaml")
    (home / "away").symlink_to(root)
    (home / "sub" / "cuts.yaml").write_text("split: {policy: at, after: ['1']}\n")
    hostile.spec(home, name="good.yaml")
    return home


def _placed(draw: random.Random, name: str) -> tuple[str, str]:
    """A replacement that puts a name at a random place."""
    arguments = draw.choice(ARGUMENTS)
    reference = f'{{name: "{name}", args: {{{arguments}}}}}'
    return draw.choice(
        [
            (MODEL, reference),
            (DATA, reference),
            ("data:", f'loss: "{name}"\ndata:'),
            constrained(name.replace("\\", "")),
        ]
    )


def _hostile(draw: random.Random, root: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Replacements that must be refused, and options that do not allow them."""
    kinds: list[Callable[[], tuple[str, list[str]]]] = [
        lambda: (draw.choice(COMMAND), draw.choice([[], ["--trust", "os"], ["--trust", "zz_beside"]])),
        lambda: (f"{draw.choice(sorted(sys.stdlib_module_names))}:{draw.choice(['run', 'main', 'system', 'a.b'])}", []),
        lambda: (f"{draw.choice(TAIL)}.{draw.choice(CHAINS)}", ["--trust", "zz_vision", "--trust", "torch"]),
        lambda: (f"zz_vision.models:{draw.choice(INSIDE)}", ["--trust", "zz_vision"]),
        lambda: (draw.choice(ODD), ["--trust", "zz_beside"]),
        lambda: (draw.choice(LOADERS), ["--trust", "torch", "--trust", "numpy"]),
        lambda: (
            draw.choice(["zz_beside:net", "zz_pack.inner:net", "zz_link:net"]),
            draw.choice([[], ["--trust", "zz"]]),
        ),
        lambda: (draw.choice(["zz_vision.models:resnet18", "typer:run", "scipy.io:loadmat"]), HERE),
        lambda: (draw.choice(["queue:net", "sklearn.nothing:net"]), draw.choice([[], ["--trust", "queue"]])),
    ]
    if draw.random() < 0.7:
        name, options = draw.choice(kinds)()
        return [_placed(draw, name)], options
    path = draw.choice(PATHS).format(abs=root / "secret.yaml")
    if draw.random() < 0.4:
        return [("name: moons", f'name: "{draw.choice(NAMES)}"')], []
    folder = f'{{name: exported, args: {{folder: "{path}"}}}}'
    return [draw.choice([(SPLIT, f'"{path}"'), (MODEL, folder)])], []


def _allowed(draw: random.Random, home: Path) -> tuple[list[tuple[str, str]], list[str]]:
    cuts = (SPLIT, draw.choice(["{policy: at, after: ['1']}", "sub/cuts.yaml", "./sub/cuts.yaml"]))
    beside = [["--trust", "zz_beside"], ["--trust", "zz_beside.py"], ["--trust", str(home / "zz_beside.py")], []]
    name, options = draw.choice(
        [
            ("zz_beside:net", draw.choice(beside)),
            ("zz_pack.inner:net", draw.choice([["--trust", "zz_pack"], ["--trust", "zz_pack.inner"], []])),
            ("zz_vision.models:resnet18", draw.choice([["--trust", "zz_vision"], ["--trust", "zz_vision.models"]])),
            ("zz_vision:models.resnet.resnet18", ["--trust", "zz_vision"]),
        ]
    )
    return [(MODEL, f"{{name: '{name}'}}"), cuts], options


def case(seed: int) -> Mapping[str, int]:
    """One spec on one command."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve()
        home = _world(root)
        with _moved(root, home):
            if draw.random() < 0.25:
                replacements, options = _allowed(draw, home)
                if not options:
                    assert _called(["trust", draw.choice([".", str(root)])])[0] == 0
                hostile.spec(home, *replacements)
                status, said = _called([*_command(draw), *options])
                assert status in {0, 1}, said
                return {"allowed": 1}
            replacements, options = _hostile(draw, root)
            path = hostile.spec(home, *replacements)
            if options is HERE:
                assert _called(["trust", "."])[0] == 0
                options = []
            if draw.random() < 0.3:  # another folder is trusted
                assert _called(["trust", str(root / "other")])[0] == 0
            before = hostile.files(root)
            status, said = _called([*_command(draw), *options])
            assert status == 2, f"{path.read_text()} {options}: {said}"
            assert len(said.splitlines()) == 1, said
            assert said.startswith("x.yaml:"), said
            assert said.rstrip("\n").isprintable(), repr(said)
            assert hostile.SECRET not in said, said
            assert hostile.files(root) == before, hostile.files(root) - before
            return {"refused": 1}


def _command(draw: random.Random) -> list[str]:
    name, *more = draw.choice(COMMANDS)
    return [name, "x.yaml", *more]


@contextlib.contextmanager
def _moved(root: Path, home: Path) -> Iterator[None]:
    """The folder, configuration and packages of a case; all is as before afterwards."""
    folder, modules = Path.cwd(), set(sys.modules)
    os.chdir(home)
    try:
        with (
            mock.patch.dict(os.environ, {"XDG_CONFIG_HOME": str(root / "config")}),
            mock.patch.object(sys, "path", [*sys.path, str(root / "site")]),
            mock.patch.object(sys, "dont_write_bytecode", True),
        ):
            yield
    finally:
        os.chdir(folder)
        for name in {n for n in set(sys.modules) - modules if n.startswith("zz_")}:
            del sys.modules[name]


def _called(arguments: list[str]) -> tuple[int, str]:
    """Exit status and standard error of one command."""
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["lagcompile", *arguments]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0), said.getvalue()
    return 0, said.getvalue()


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Both kinds were drawn."""
    assert tally["refused"] > 0.5 * cases
    assert tally["allowed"] > 0.1 * cases
