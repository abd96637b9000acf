"""Folders that somebody made to do harm: loading runs nothing, and says in one line what is wrong.

Every case here has hashes and digests that fit: whoever changes a folder can compute them again.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

import lagcompile as lc
from tests.export import archives
from tests.export.folders import edited, residual, rewritten, sealed

Archive = Callable[[Path], bytes]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual(tmp_path_factory.mktemp("written"))[1]


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("archive", [archives.opaque, archives.spaced, archives.symbolic])
@pytest.mark.parametrize("place", ["as a stage", "in a folder of format 1"])
def test_archives_of_torch_export_are_never_opened(archive: Archive, place: str, folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = archive(canary)
    if place == "as a stage":
        rewritten(folder, "stage_1.json", data)
        message = r"stage_1\.json:1: the file (is not UTF-8 text|holds a NUL byte)"
    else:
        manifest = read(folder, "manifest.json")
        rewritten(folder, "stage_1.pt2", data)
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
        message = "is of format 1 .* export the model again"
    with pytest.raises(lc.DataError, match=message):
        lc.load(folder)
    assert not canary.exists()
    with contextlib.suppress(Exception):
        torch.export.load(_file(tmp_path / "archive.pt2", data)).module()(torch.zeros(3, 3))
    assert canary.exists()  # the archive is dangerous indeed


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


OPERATORS = [
    "os.system.default",
    "builtins.eval.default",
    "builtins.exec",
    "aten.from_file.default",
    "aten._print.default",
    "aten.save.default",
    "aten.set_.source_Tensor",
    "aten.resize_.default",
    "aten._foreach_add_.Scalar",
    "aten.tanh.names",
    "aten.tanh.__class__",
    "aten.tanh.default.__globals__",
    "aten.__class__.default",
    "aten.__init__.default",
    "aten.add.str",
    "aten.add.t",
    "aten._foobar.default",
    "aten.tanh",
    "aten..default",
    "aten::tanh",
    "prim.rpc_async.default",
    "profiler._record_function_enter.default",
    "higher_order.run_and_save_rng_state",
    "torch.ops.aten.tanh.default",
    "size.__import__",
    "size.getattr",
    "size.eval",
    "size.__class__",
    "size",
    "call_method",
    "get_attr",
    "",
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_outside_the_list(operator: str, folder: Path) -> None:
    program = read(folder, "stage_0.json")
    program["train"]["nodes"][-1]["operator"] = operator
    edited(folder, "stage_0.json", program)
    with pytest.raises(lc.DataError, match=r"stage_0\.json: node 'v\d+': the operator .* is not among those"):
        lc.load(folder)


def node(name: Any = "v9", operator: Any = "aten.tanh.default", *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"name": name, "operator": operator, "args": list(args), "kwargs": kwargs}


INPUT = {"node": "v0"}
NOT_A_NAME = "is not the name of a node"
NODES: dict[str, tuple[Any, str]] = {
    "injected name": (node("v9 = __import__('os').system('id')", "aten.tanh.default", INPUT), NOT_A_NAME),
    "new line": (node("v9\nimport os", "aten.tanh.default", INPUT), NOT_A_NAME),
    "keyword": (node("lambda", "aten.tanh.default", INPUT), NOT_A_NAME),
    "dunder": (node("__import__", "aten.tanh.default", INPUT), NOT_A_NAME),
    "torch": (node("torch", "aten.tanh.default", INPUT), NOT_A_NAME),
    "no text": (node(7, "aten.tanh.default", INPUT), "'name'"),
    "twice": (node("v0", "aten.tanh.default", INPUT), "two nodes are called v0"),
    "later": (node("v9", "aten.tanh.default", {"node": "v9"}), "there is no node 'v9' before it"),
    "tensor of another": (node("v9", "aten.tanh.default", {"tensor": "last.bias"}), "there is no tensor 'last.bias'"),
    "attribute": (node("v9", "aten.tanh.default", {"tensor": "__class__"}), "there is no tensor '__class__'"),
    "text for a tensor": (node("v9", "aten.tanh.default", "__import__('os')"), "'self' must be of type Tensor"),
    "list for a tensor": (node("v9", "aten.tanh.default", [INPUT]), "'self' must be of type Tensor"),
    "unknown word": (node("v9", "aten.tanh.default", {"pickle": "gASV"}), "there is no 'pickle' 'gASV'"),
    "two words": (node("v9", "aten.tanh.default", {"node": "v0", "tensor": "x"}), "not a plain value"),
    "dtype": (node("v9", "aten._to_copy.default", INPUT, dtype={"dtype": "load"}), "there is no 'dtype' 'load'"),
    "device": (node("v9", "aten._to_copy.default", INPUT, device={"device": "cpu; id"}), "there is no 'device'"),
    "too many": (node("v9", "aten.tanh.default", INPUT, INPUT), "2 arguments are too many"),
    "too few": (node("v9", "aten.tanh.default"), "its argument 'self' is missing"),
    "unknown argument": (node("v9", "aten.tanh.default", INPUT, out=INPUT), "has no argument 'out'"),
    "given twice": (node("v9", "aten.tanh.default", INPUT, self=INPUT), "has no argument 'self'"),
    "generator": (node("v9", "aten.bernoulli.default", INPUT, generator=INPUT), "'generator' must be of type"),
    "entry of a tensor": (node("v9", "item", INPUT, 0), "there is no entry 0"),
    "entry by name": (node("v9", "item", INPUT, "__class__"), "item takes a node and a whole number"),
    "arithmetic of texts": (node("v9", "size.mul", "a", 1 << 40), "it takes one to three numbers"),
    "arithmetic of tensors": (node("v9", "size.add", INPUT, 1), "it takes one to three numbers"),
    "several for one": (node("v9", "aten.max.dim", INPUT, 0), ""),
    "no object": ([1, 2], "a node has the keys"),
    "more keys": ({**node("v9", "aten.tanh.default", INPUT), "meta": {}}, "a node has the keys"),
    "setting": (
        {"name": "v9", "operator": "grad", "args": [INPUT], "setting": ["id"], "body": {}},
        "not a setting",
    ),
    "tensors in a region": (
        {
            "name": "v9",
            "operator": "grad",
            "args": [INPUT],
            "setting": [False],
            "body": {"inputs": ["v0"], "nodes": [], "outputs": [{"tensor": "first.weight"}]},
        },
        "there is no tensor 'first.weight' before it",
    ),
}


@pytest.mark.parametrize("what", NODES)
def test_nodes_that_are_none(what: str, folder: Path) -> None:
    data, message = NODES[what]
    program = read(folder, "stage_0.json")
    program["train"]["nodes"].append(data)
    if what == "several for one":
        program["train"]["nodes"].append(node("v10", "aten.tanh.default", {"node": "v9"}))
        message = "'self' must be of type Tensor"
    edited(folder, "stage_0.json", program)
    with pytest.raises(lc.DataError, match=message) as caught:
        lc.load(folder)
    assert "stage_0.json: node" in str(caught.value)
    assert len(caught.value.problems) == 1


TEXTS: dict[str, tuple[str, str]] = {
    "duplicate keys": ('{"reads": [], "reads": []}', "the key 'reads' is given twice"),
    "NaN": ('{"reads": NaN}', "NaN is not a number in JSON"),
    "Infinity": ('{"reads": -Infinity}', "-Infinity is not a number in JSON"),
    "huge number": ('{"reads": 1' + "0" * 5000 + "}", "is too long"),
    "just too large": (f'{{"reads": {1 << 63}}}', "does not fit into 64 bits"),
    "huge float": ('{"reads": 1e999}', "is too large"),
    "long float": ('{"reads": 0.' + "1" * 100_000 + "}", "reads: "),
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "nested": ("[" * 300 + "]" * 300, "nested too deeply"),
    "a list": ("[]", "stage_0.json: "),
    "not UTF-8": ("\udcff", "not UTF-8 text"),
    "empty": ("", "the file is empty"),
    "two documents": ("{} {}", "not valid JSON: extra data"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_json_with_more_than_one_meaning(what: str, folder: Path) -> None:
    text, message = TEXTS[what]
    rewritten(folder, "stage_0.json", text.encode(errors="surrogateescape"))
    with pytest.raises(lc.DataError, match=message) as caught:
        lc.load(folder)
    assert len(caught.value.problems) == 1
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(lc.DataError, match=r"manifest\.json"):
        lc.load(folder)


def test_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    stage = (folder / "stage_1.json").read_bytes()
    secret.write_bytes(stage)
    (folder / "stage_1.json").unlink()
    (folder / "stage_1.json").symlink_to(secret)
    with pytest.raises(lc.DataError, match=r"stage_1\.json is a link, which is not followed"):
        lc.load(folder)
    (folder / "stage_1.json").unlink()
    os.mkfifo(folder / "stage_1.json")
    with pytest.raises(lc.DataError, match=r"stage_1\.json is not a regular file"):
        lc.load(folder)
    (folder / "stage_1.json").unlink()
    (folder / "stage_1.json").mkdir()
    with pytest.raises(lc.DataError, match=r"stage_1\.json is not a regular file"):
        lc.load(folder)
    (folder / "stage_1.json").rmdir()
    (folder / "stage_1.json").write_bytes(stage)
    (folder / "more.json").write_text("{}")
    with pytest.raises(lc.DataError, match=r"more\.json does not belong to the exported folder"):
        lc.load(folder)
    (folder / "more.json").unlink()
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(_file(tmp_path / "manifest", manifest))
    with pytest.raises(lc.DataError, match=r"manifest\.json is a link"):
        lc.load(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".", "..", "", "stage_7.json", "\x00"])
def test_paths_of_a_manifest_stay_in_the_folder(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    manifest = read(folder, "manifest.json")
    for files in ({**manifest["files"], name: {"sha256": "0", "bytes": 4}}, {name: {"sha256": "0", "bytes": 4}}):
        sealed(folder, {**manifest, "files": files})
        with pytest.raises(lc.DataError, match=r"its entry of the file .* is missing or wrong") as caught:
            lc.load(folder)
        assert "mine" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 10**6, 1 << 62, -1])
def test_sizes_are_checked_before_anything_is_read(size: int, folder: Path) -> None:
    manifest = read(folder, "manifest.json")
    manifest["files"]["tensors.safetensors"]["bytes"] = size
    sealed(folder, manifest)
    with pytest.raises(lc.DataError, match=r"tensors\.safetensors was changed or damaged: it has \d+ bytes"):
        lc.load(folder)


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return changed


TENSORS: dict[str, Callable[[bytes], bytes]] = {
    "header beyond the file": lambda d: struct.pack("<Q", 1 << 62) + d[8:],
    "header of nothing": lambda d: struct.pack("<Q", 0) + d[8:],
    "truncated": lambda d: d[:-4],
    "longer": lambda d: d + bytes(4),
    "zeros": lambda d: bytes(len(d)),
    "offsets beyond the file": _header(lambda h: h["last.bias"].update(data_offsets=[0, 1 << 62])),
    "negative offsets": _header(lambda h: h["last.bias"].update(data_offsets=[-8, 4])),
    "shape": _header(lambda h: h["last.bias"].update(shape=[1 << 40])),
    "shape of a product that overflows": _header(lambda h: h["last.bias"].update(shape=[1 << 33, 1 << 33])),
    "overlap": _header(lambda h: h["last.bias"].update(data_offsets=h["first.bias"]["data_offsets"])),
    "type": _header(lambda h: h["last.bias"].update(dtype="I32")),
    "unknown type": _header(lambda h: h["last.bias"].update(dtype="PICKLE")),
    "other name": _header(lambda h: h.update(other=h.pop("last.bias"))),
    "other shape": _header(lambda h: h["last.bias"].update(shape=[3, 1])),
}


@pytest.mark.parametrize("what", TENSORS)
def test_headers_of_tensors_that_lie(what: str, folder: Path) -> None:
    rewritten(folder, "tensors.safetensors", TENSORS[what]((folder / "tensors.safetensors").read_bytes()))
    with pytest.raises(lc.DataError, match=r"tensors\.safetensors(:| is damaged)") as caught:
        lc.load(folder)
    assert len(caught.value.problems) == 1


def _renamed(manifest: dict[str, Any], name: str) -> None:
    manifest["tensors"][name] = manifest["tensors"].pop("last.bias")


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "alias": (lambda m: m["ties"].update({"second.weight": ["x.__class__"]}), "names of its tensors are not names"),
    "quote": (lambda m: m["ties"].update({"second.weight": ['a"); import os; ("']}), "names of its tensors"),
    "empty alias": (lambda m: m["ties"].update({"second.weight": ["a..b"]}), "names of its tensors"),
    "alias twice": (lambda m: m["ties"].update({"second.weight": ["first.weight"]}), "names of its tensors"),
    "tie of nothing": (lambda m: m["ties"].update({"absent": ["other"]}), "names of its tensors"),
    "method": (lambda m: m["ties"].update({"second.weight": ["forward"]}), "'forward' already exists"),
    "other tensor": (lambda m: _renamed(m, "last.other"), "tensors.safetensors: 'last.bias' is not there"),
    "argument": (lambda m: m["call"].update(names=["x=__import__('os')"]), "names of the call's arguments"),
    "keyword argument": (lambda m: m["call"].update(parameters=["lambda"]), "names of the call's arguments"),
    "leaf": (lambda m: m["call"].update(structure={"value": 7}), "structure of the call"),
    "class": (
        lambda m: m.update(output={"kind": "torch", "name": "__loader__", "items": []}),
        "no type: ",
    ),
    "function": (
        lambda m: m.update(output={"kind": "torch", "name": "pytree_register_structseq", "items": []}),
        "no type: ",
    ),
    "named tuple": (
        lambda m: m.update(output={"kind": "named", "name": "A", "keys": ["x, eval('')"], "items": [{"ref": "x"}]}),
        "not a named tuple",
    ),
    "private field": (
        lambda m: m.update(output={"kind": "named", "name": "A", "keys": ["_fields"], "items": [{"ref": "x"}]}),
        "not a named tuple",
    ),
    "kind": (lambda m: m.update(output={"kind": "os.system", "items": [{"value": "id"}]}), "not a container"),
    "no value": (lambda m: m.update(output={"ref": "absent"}), "nothing writes 'absent'"),
    "stages": (lambda m: m.update(stages=1 << 40), "stages: "),
    "no stage": (lambda m: m.update(stages=0), "stages: "),
    "front end": (lambda m: m.update(front_end="pickle"), "front_end: "),
    "extra": (lambda m: m.update(run="id"), "run: "),
    "text for a number": (lambda m: m.update(stages="3"), "stages: "),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifests_that_lie(what: str, folder: Path) -> None:
    change, message = MANIFESTS[what]
    manifest = read(folder, "manifest.json")
    change(manifest)
    sealed(folder, manifest)
    with pytest.raises(lc.DataError, match=message) as caught:
        lc.load(folder)
    assert len(caught.value.problems) == 1


def test_a_node_whose_operator_is_no_text_and_stages_without_number(folder: Path) -> None:
    operators: list[Any] = [{}, [], [1], None]
    for operator in operators:
        program = read(folder, "stage_0.json")
        program["train"]["nodes"][0]["operator"] = operator
        edited(folder, "stage_0.json", program)
        with pytest.raises(lc.DataError, match=r"stage_0\.json: .*operator"):
            lc.load(folder)
    edited(folder, "manifest.json", {**read(folder, "manifest.json"), "stages": 100_000})
    with pytest.raises(lc.DataError, match="more of its entries") as caught:
        lc.load(folder)
    assert len(caught.value.problems) <= 11


def test_a_folder_holds_no_functions_of_constraints(folder: Path, tmp_path: Path) -> None:
    call = lc.ValueConstraint(name="c", reads=("h1",), function="subprocess:check_output")
    lifted = lc.lift(_two(), (torch.randn(4, 5),), split=2, formulation=lc.Formulation(constraints=(call,)))
    with pytest.raises(lc.LiftError, match=r"the constraint 'c' calls subprocess:check_output.* holds no code"):
        lifted.save(tmp_path / "constrained")
    formulation = read(folder, "formulation.json")
    formulation["constraints"] = [call.model_dump(mode="json")]
    edited(folder, "formulation.json", formulation)
    with pytest.raises(lc.DataError, match=r"a constraint calls 'subprocess:check_output', and a folder holds no code"):
        lc.load(folder)


def _two() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))


def test_graphs_in_a_circle_end(folder: Path) -> None:
    graph = read(folder, "graph.json")
    for entry in graph["nodes"]:
        if entry["name"] in {"tanh", "add"}:
            entry["inputs"] = ["add" if entry["name"] == "tanh" else "tanh"]
    edited(folder, "graph.json", graph)
    with pytest.raises(lc.DataError, match=r"graph\.json: the node 'tanh' occurs twice, or before what it reads"):
        lc.load(folder)


class Rounded(torch.autograd.Function):
    """Rounds forwards, and hands gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Straight(nn.Module):
    """A backward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([Rounded.apply(column) for column in x.unbind(1)], 1)


@library.custom_op("lagcompile_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operator of the user's."""
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(nn.Module):
    """An operator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = twice(self.inner(x))
        return found


def test_what_is_no_operator_of_torch_is_refused_where_it_stands(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    lifted = lc.lift(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), Custom(), nn.Linear(5, 2)), (x,), split=2)
    with pytest.raises(lc.LiftError, match=r"the module '2' uses the operator lagcompile_tests\.twice\.default"):
        lifted.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backward_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    lifted = lc.lift(nn.Sequential(nn.Linear(5, 5), Straight(), nn.Linear(5, 2)), (x,), split=2)
    with pytest.raises(lc.LiftError, match=r"give another gradient of '0\.bias' \(Rounded: a custom backward"):
        lifted.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["stage_1.json", "data.json", "network.json"])
def test_a_truncated_or_zeroed_file_is_named(file: str, folder: Path) -> None:
    data = (folder / file).read_bytes()
    for damaged in (data[: len(data) // 2], bytes(len(data)), b""):
        (folder / file).write_bytes(damaged)
        with pytest.raises(lc.DataError, match=file.replace(".", r"\.")):
            lc.load(folder)


def test_what_is_loaded_is_a_copy_that_nothing_of_the_file_can_reach(folder: Path) -> None:
    loaded = lc.load(folder)
    x = torch.randn(3, 6)
    before = loaded.eval()(x)
    for file in folder.iterdir():
        file.write_bytes(bytes(10))
    assert torch.equal(copy.deepcopy(loaded)(x), before)
