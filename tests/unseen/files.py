"""Damaged and edited files: each gives a sane result or a named problem, no traceback, no hang, no file elsewhere.

A case takes a sound file (a spec, split, program, certificate, table of numbers, data set, row of a bench), changes it
as a slip of the hand or a bad disk would, and calls what reads it in this process.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from ruamel.yaml import YAML

import lagcompile as lc
from lagcompile.dynamics import Trajectories, read_csv
from lagcompile.workbench import data as named_data
from lagcompile.workbench.cli import main
from tests.unseen._mutate import of_bytes, of_data, of_table
from tests.workbench.specs import MOONS

CI, NIGHTLY = 1000, 20_000
SECONDS = 5
"""Of the processor, after which a case counts as hanging."""
SOUND = 0.08
"""Share of files that are left as they are."""
SPECS = Path(__file__).parents[2] / "specs"
SHOOTING = """\
kind: shooting
name: small
system: {name: pendulum, samples: 21, dt: 0.05, noise: 0.01, initial: [0.5, 0.0], observed: [0]}
starts: {count: 2, factor: 1.5, seed: 1}
method: {iterations: 2}
"""
TABLE = ("--data", "digits", "--steps", "2", "--seeds", "1", "--trials", "1", "--search-steps", "1")
ROWS = ("bench", "table1", *TABLE, "--systems", "backprop,distprop", "--out", "rows")


class Hang(BaseException):
    """A case that does not end."""


# ---------------------------------------------------------------- sound files
@cache
def specs() -> tuple[str, ...]:
    """Texts of run specs; small ones more often."""
    return (MOONS,) * 20 + tuple(p.read_text() for p in sorted(SPECS.glob("*.yaml")))


@cache
def sound() -> Mapping[str, bytes]:
    """What the package itself writes, made once."""
    found: dict[str, bytes] = {}
    with inside():
        Path("moons.yaml").write_text(MOONS)
        found["program.json"] = called("show", "moons.yaml", "--json")[1].encode()
        called("verify", "moons.yaml", "--out", "certificate.json")
        called(*ROWS)
        for path in (Path("certificate.json"), Path("rows/protocol.json"), Path("rows/rows.jsonl")):
            found[str(path)] = path.read_bytes()
    return found


# ---------------------------------------------------------------- calling
@contextlib.contextmanager
def inside() -> Iterator[Path]:
    """An empty working folder, beside which nothing may appear."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as outer:
        work = Path(outer) / "work"
        work.mkdir()
        os.chdir(work)
        try:
            yield work
            beside = sorted(p.name for p in Path(outer).iterdir())
            assert beside == ["work"], f"written outside the working folder: {beside}"
        finally:
            os.chdir(before)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Stop what takes too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"not finished after {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def called(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command line."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["lagcompile", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main()
    except SystemExit as left:
        return int(left.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command line did not leave with a status")


def command(name: str, *arguments: str, verdict: bool = False) -> str:
    """Call a command on the mutated file `name`; what happened."""
    status, out, err = called(*arguments)
    assert status in ((0, 1, 2) if verdict else (0, 2)), f"exit {status}: {err[:1500]}"
    assert "Traceback" not in err, err[-1500:]
    if status == 2:
        assert name in err, f"the problem does not name the file {name}: {err[:600]!r}"
        assert all(len(line) < 3000 for line in err.splitlines()), f"a line of {len(err)} characters: {err[:300]}"
        assert "object at 0x" not in err, err[:600]
        return "refused"
    assert out.strip(), "nothing was printed"
    return "taken"


def function(call: Callable[[], object]) -> str:
    """Call a public function; what happened."""
    problems: tuple[str, ...] = ()
    try:
        call()
    except lc.LagcompileError as error:
        problems = error.problems or ("",)
    assert all(p.strip() and len(p) < 3000 for p in problems), problems
    return "refused" if problems else "taken"


# ---------------------------------------------------------------- cases
def spec(rng: random.Random) -> str:
    """A run spec, shown, planned or compared; few are solved, as that takes long."""
    text = rng.choice(specs())
    Path("x.yaml").write_bytes(edited_yaml(text, rng))
    if "two_moons" in text and rng.random() < 0.06:
        return command("x.yaml", "solve", "x.yaml", "--steps", "2", "-q", "--out", "out", verdict=True)
    Path("y.yaml").write_text(MOONS)
    return command("x.yaml", *rng.choice([("show", "x.yaml"), ("plan", "x.yaml"), ("diff", "y.yaml", "x.yaml")]))


def shooting(rng: random.Random) -> str:
    """A multiple-shooting spec with two guesses and few iterations."""
    Path("x.yaml").write_bytes(edited_yaml(SHOOTING, rng))
    return command("x.yaml", "solve", "x.yaml", "--out", "out", verdict=True)


def split(rng: random.Random) -> str:
    """A split file, read by a spec, by `diff` and by `lift`."""
    text = rng.choice(
        [
            "split: {policy: at, after: [layers.2, layers.4]}\n",
            "split: {policy: balanced, stages: 2}\n",
            "split: {policy: memory, budget: 1 MiB, examples: 100}\n",
            "split: {policy: every, modules: 1}\n",
            "split:\n  policy: conditioning\n  stages: 2\n",
        ]
    )
    Path("cuts.yaml").write_bytes(edited_yaml(text, rng))
    Path("x.yaml").write_text(MOONS.replace("{policy: at, after: [layers.2, layers.4]}", "cuts.yaml"))
    if rng.random() < 0.5:
        return command("yaml", *rng.choice([("show", "x.yaml"), ("diff", "x.yaml", "cuts.yaml")]))
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return function(lambda: lc.lift(net, (torch.ones(4, 2),), split="cuts.yaml"))


def program(rng: random.Random) -> str:
    """A program's JSON, next to itself or to the spec it came from."""
    Path("x.json").write_bytes(edited_json(sound()["program.json"], rng))
    Path("y.json").write_bytes(sound()["program.json"])
    Path("y.yaml").write_text(MOONS)
    return command("x.json", "diff", *rng.choice([("x.json", "y.json"), ("y.yaml", "x.json"), ("x.json", "x.json")]))


def certificate(rng: random.Random) -> str:
    """A certificate: loaded and printed, or held against a new one."""
    Path("x.json").write_bytes(edited_json(sound()["certificate.json"], rng))
    if rng.random() < 0.9:
        return function(lambda: str(lc.Certificate.load("x.json")))
    Path("y.yaml").write_text(MOONS)
    return command("x.json", "verify", "y.yaml", "--against", "x.json", verdict=True)


def table(rng: random.Random) -> str:
    """A CSV file of measurements."""
    Path("x.csv").write_bytes(of_table(rng))
    time = rng.choice(["t", "t", None])
    return function(
        lambda: Trajectories.stack([read_csv("x.csv", outputs=["angle"], inputs=["torque"], time=time)]).to(
            dtype=torch.float32
        )
    )


def dataset(rng: random.Random) -> str:
    """MNIST's or CIFAR-10's files, small ones, one of them damaged."""
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    name = rng.choice(["mnist", "cifar10"])
    Path(name).mkdir()
    for part in ("train", "t10k") if name == "mnist" else ("train", "test"):
        labels = np.arange(20, dtype=np.uint8) % 10
        if name == "mnist":
            images = numbers.integers(0, 255, (20, 28, 28), dtype=np.uint8)
            for kind, array in (("images", images), ("labels", labels)):
                head = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
                path = Path(name) / f"{part}-{kind}-idx{array.ndim}-ubyte"
                path.write_bytes(head + array.tobytes())
        else:
            images = numbers.integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
            save = rng.choice([np.savez, np.savez_compressed])
            wrong = np.dtype(rng.choice(["f8", "i1", "u1", "u1", "U3", "?"]))
            save(Path(name) / f"{part}.npz", images=images, labels=labels.astype(wrong))
    victim = rng.choice(sorted(Path(name).iterdir()))
    damaged = victim.read_bytes() if rng.random() < SOUND else of_bytes(victim.read_bytes(), rng)
    victim.write_bytes(damaged)
    if name == "mnist" and rng.random() < 0.3:
        victim.unlink()
        victim.with_name(victim.name + ".gz").write_bytes(of_bytes(gzip.compress(damaged, mtime=0), rng))
    before = os.environ.get("LAGCOMPILE_DATA")
    os.environ["LAGCOMPILE_DATA"] = "."
    try:
        return function(lambda: getattr(named_data, name)(validation=2))
    finally:
        os.environ.pop("LAGCOMPILE_DATA")
        if before is not None:
            os.environ["LAGCOMPILE_DATA"] = before


def rows(rng: random.Random) -> str:
    """The folder of a bench with one file changed; nothing is left to run."""
    names = [n for n in sound() if n.startswith("rows/")]
    victim = rng.choice(names)
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        edited = edited_lines if name.endswith(".jsonl") else edited_json
        Path(name).write_bytes(edited(sound()[name], rng) if name == victim else sound()[name])
    return command("rows", *ROWS)


KINDS: Mapping[str, tuple[Callable[[random.Random], str], int]] = {
    "spec": (spec, 30),
    "split": (split, 12),
    "program": (program, 18),
    "certificate": (certificate, 14),
    "table": (table, 16),
    "dataset": (dataset, 5),
    "rows": (rows, 3),
    "shooting": (shooting, 2),
}


def edited_yaml(text: str, rng: random.Random) -> bytes:
    """A YAML text, changed as text or as data; now and then as it was."""
    if rng.random() < SOUND:
        return text.encode()
    if rng.random() < 0.4:
        return of_bytes(text.encode(), rng)
    out = io.StringIO()
    value = of_data(YAML(typ="safe", pure=True).load(text), rng)
    try:
        json.dump(value, out)  # JSON is YAML
    except (RecursionError, ValueError):
        return of_bytes(text.encode(), rng)
    return out.getvalue().replace("Infinity", ".inf").replace("NaN", ".nan").encode()


def edited_json(text: bytes, rng: random.Random) -> bytes:
    """A JSON text, changed as text or as data; now and then as it was."""
    if rng.random() < SOUND:
        return text
    if rng.random() < 0.4:
        return of_bytes(text, rng)
    return json.dumps(of_data(json.loads(text), rng), indent=2).encode()


def edited_lines(text: bytes, rng: random.Random) -> bytes:
    """Rows, changed as text, or one of them as data, with a digest that fits; now and then as they were."""
    if rng.random() < SOUND:
        return text
    if rng.random() < 0.4:
        return of_bytes(text, rng)
    lines = text.decode().splitlines()
    number = rng.randrange(len(lines))
    data = json.loads(lines[number])
    del data["sha256"]
    new = json.dumps(of_data(data, rng))
    lines[number] = f'{new[:-1]}, "sha256": "{hashlib.sha256(new.encode()).hexdigest()[:16]}"}}'
    return "".join(f"{line}\n" for line in lines).encode()


def case(seed: int) -> Mapping[str, int]:
    """One file, changed, and what reads it."""
    rng = random.Random(seed)
    names = list(KINDS)
    sound()
    name = rng.choices(names, [KINDS[n][1] for n in names])[0]
    with inside(), limited():
        try:
            happened = KINDS[name][0](rng)
        except Hang as error:
            raise AssertionError(f"{name}: {error}") from error
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return {f"{name} {happened}": 1, happened: 1}


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Neither everything nor nothing is refused, of each kind."""
    assert tally.get("failed", 0) == 0
    if cases >= 500:
        for name in KINDS:
            found = tally.get(f"{name} taken", 0), tally.get(f"{name} refused", 0)
            assert sum(found) < 50 or min(found) >= 1, f"{name}: {found[0]} taken, {found[1]} refused"
