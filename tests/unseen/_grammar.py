"""Random modules as source text: views, writes, loops, regions, containers, modules in modules, from a seed.

In: a `random.Random`. Out: `Drawn`, whose `build()` is the module. Invariant: a seed always gives the same text; the
text is real Python with lines of its own, so that places in messages can be looked at.
"""

from __future__ import annotations

import linecache
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from tests.unseen._words import (
    ALWAYS,
    ANY,
    BUFFERS,
    COLUMN,
    FLAT,
    FRESH,
    GRID,
    HALF,
    HEAD,
    LAYERS,
    LOOPS,
    OUTPUTS,
    PARTS,
    PURE,
    REGIONS,
    SIDES,
    VIEWS,
    WRITES,
)


class Pair(NamedTuple):
    """Two outputs."""

    first: Any
    second: Any


@dataclass
class Record:
    """An output with names."""

    main: Any
    other: Any = None


class Straight(torch.autograd.Function):
    """Rounds; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(2.0 * x) / 2.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Scaled(torch.autograd.Function):
    """Product whose backward differs from the derivative of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return 0.5 * gradients[0] * y, 2.0 * gradients[0] * x


@dataclass(frozen=True)
class Drawn:
    """A module as text."""

    source: str
    name: str

    def build(self) -> nn.Module:
        """The module, with weights of the global generator."""
        linecache.cache[self.name] = (len(self.source), None, self.source.splitlines(True), self.name)
        space: dict[str, Any] = {
            "torch": torch,
            "nn": nn,
            "F": functional,
            "Straight": Straight,
            "Scaled": Scaled,
            "Pair": Pair,
            "Record": Record,
            "OrderedDict": OrderedDict,
            "__name__": "drawn",
        }
        exec(compile(self.source, self.name, "exec"), space)
        module: nn.Module = space["Drawn"]()
        return module


@dataclass
class Drawer:
    """Writes one class, line by line: its forward over x and y, and the classes of its sub-modules ahead of it."""

    random: random.Random
    name: str
    depth: int
    """How deep its sub-modules may hold sub-modules."""
    ahead: list[str] = field(default_factory=list)
    """Sources of the classes of sub-modules."""
    parts: list[tuple[str, str]] = field(default_factory=list)
    """Sub-modules: attribute, and how their main value is read."""
    lines: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=lambda: {k: [] for k in PURE})
    fresh: dict[str, list[str]] = field(default_factory=lambda: {k: [] for k in PURE})
    """Values whose memory may be written into without autograd missing what was there."""
    indent: int = 2
    count: int = 0

    def draw(self, steps: int) -> None:
        """The statements of a forward over x and y."""
        for name in ("x", "y"):
            self.values[FLAT].append(name)
        for kind, text in ((HALF, "self.r(x)"), (GRID, "y.view(-1, 2, 3)"), (COLUMN, "y.sum(1)")):
            self.put(kind, text)
        choices: list[tuple[Callable[[], None], int]] = [
            (self.pure, 14),
            (self.make, 4),
            (self.view, 6),
            (self.write, 8),
            (self.loop, 1),
            (self.fill, 2),
            (self.region, 1),
            (self.buffer, 1),
            (self.branch, 1),
            (self.alias, 1),
            (self.pieces, 1),
            (self.closure, 1),
            (self.attribute, 1),
            (self.part, 2 * (self.depth > 0)),
        ]
        actions, weights = zip(*choices, strict=True)
        for _ in range(steps):
            self.random.choices(actions, weights)[0]()

    def source(self, output: str) -> str:
        """The class, and ahead of it those of its sub-modules."""
        forward = "\n".join(["    def forward(self, x, y):", *self.lines, f"        return {output}"])
        read = set(re.findall(r"self\.(\w+)", forward))
        held = [f"        self.{n} = {text}" for n, text in LAYERS.items() if n in read or n in ALWAYS]
        held += [f"        self.{attribute} = {attribute.title()}()" for attribute, _ in self.parts]
        if self.random.random() < 0.2:
            held.append("        self.c.weight = self.b.weight")
        return "\n\n".join([*self.ahead, HEAD.format(name=self.name) + "\n".join(held) + "\n\n" + forward])

    # ------------------------------------------------------------ text
    def say(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def pick(self, kind: str, *, fresh: bool = False) -> str:
        """A value: late ones more often, so that the network gets deep."""
        pool = (fresh and self.fresh[kind]) or self.values[kind]
        return pool[-1 - min(int(self.random.expovariate(0.5)), len(pool) - 1)]

    def text(self, template: str, **given: str) -> str:
        """A template with values in its places; capitals are values that may be written into."""
        result, kinds = template, {"f": FLAT, "h": HALF, "g": GRID, "c": COLUMN}
        for letter, kind in kinds.items():
            while f"{{{letter}}}" in result:
                result = result.replace(f"{{{letter}}}", self.pick(kind), 1)
            if f"{{{letter.upper()}}}" in result:
                result = result.replace(f"{{{letter.upper()}}}", self.pick(kind, fresh=True))
        for key, value in given.items():
            result = result.replace(f"{{{key}}}", value)
        return result

    def put(self, kind: str, text: str, *, fresh: bool = False) -> str:
        self.count += 1
        name = f"v{self.count}"
        self.say(f"{name} = {text}")
        self.values[kind].append(name)
        if fresh:
            self.fresh[kind].append(name)
        return name

    # ------------------------------------------------------------ statements
    def kind(self) -> str:
        return self.random.choices((FLAT, HALF, GRID, COLUMN), (6, 2, 2, 1))[0]

    def pure(self) -> None:
        kind = self.kind()
        self.put(kind, self.text(self.random.choice(PURE[kind])))

    def make(self) -> None:
        kind = self.kind()
        self.put(kind, self.text(self.random.choice(FRESH[kind])), fresh=True)

    def view(self) -> None:
        kind = self.kind()
        self.put(kind, self.text(self.random.choice(VIEWS[kind])), fresh=True)

    def write(self) -> None:
        kind = self.kind()
        target = self.pick(kind, fresh=self.random.random() < 0.93)
        template = self.random.choice((*ANY, *WRITES[kind], *WRITES[kind]))
        line = self.text(template, t=target, s=self.pick(kind), n=self.pick(kind))
        if self.random.random() < 0.2 and "=" not in line.replace("=True", "").replace("out=", "").replace("==", ""):
            self.put(kind, line, fresh=True)
        else:
            self.say(line)

    def loop(self) -> None:
        """A recurrent loop that fills an output, or gathers its states."""
        start = self.text(self.random.choice(("torch.zeros_like({f})", "self.b({f})", "{f}")))
        made = (
            "torch.empty_like({f})",
            "{f}.new_zeros({f}.shape)",
            "torch.empty({f}.shape[0], 6, dtype={f}.dtype)",
            "[]",
        )
        out = self.put(FLAT, self.text(self.random.choice(made)))
        h = self.put(FLAT, start)
        gathered = self.lines[-2].endswith("[]")
        self.say("for i in range(6):")
        self.indent += 1
        self.values[FLAT].remove(out)
        self.say(f"{h} = " + self.text("torch.tanh(self.a({f}) + self.b({n}))", n=h))
        self.say(f"{out}.append({h}[:, i])" if gathered else self.text(self.random.choice(LOOPS), o=out, n=h))
        self.indent -= 1
        if gathered:
            self.put(FLAT, f"torch.stack({out}, 1)", fresh=True)
        else:
            self.values[FLAT].append(out)
            self.fresh[FLAT].append(out)

    def fill(self) -> None:
        """A value made of pieces."""
        out = self.put(FLAT, self.text(self.random.choice(("torch.zeros_like({f})", "torch.empty_like({f})"))))
        self.say(self.text("{o}[:, :3] = {h}", o=out))
        self.say(
            self.text(self.random.choice(("{o}[:, 3:] = {h}", "{o}[:, 3:] = self.s({h})", "{o}[:, 3:] = 0.5")), o=out)
        )
        self.fresh[FLAT].append(out)

    def region(self) -> None:
        head = self.random.choice(REGIONS)
        self.say(f"with {head}:")
        self.indent += 1
        writes = self.make if "inference" in head else self.write  # a write there is lost to autograd
        for _ in range(self.random.randint(1, 3)):
            self.random.choice((self.pure, self.pure, self.make, writes))()
        self.indent -= 1

    def branch(self) -> None:
        self.say("if self.training:")
        name = self.pick(FLAT)
        self.say("    " + self.text(f"{name} = {name} + 0.1 * {{f}}"))

    def buffer(self) -> None:
        self.say("if self.training:")
        self.say("    " + self.text(self.random.choice(BUFFERS)))

    def alias(self) -> None:
        kind = self.kind()
        self.put(kind, self.pick(kind), fresh=True)

    def pieces(self) -> None:
        first, second = f"v{self.count + 1}", f"v{self.count + 2}"
        self.count += 2
        template = self.random.choice(
            ("{F}.chunk(2, 1)", "{F}.split(3, 1)", "{G}.unbind(1)", "torch.tensor_split({F}, 2, 1)")
        )
        self.say(f"{first}, {second} = {self.text(template)}")
        for name in (first, second):
            self.values[HALF].append(name)
            self.fresh[HALF].append(name)

    def closure(self) -> None:
        """A function over a value of the forward."""
        self.say(
            self.text(self.random.choice(("inner = lambda t: self.b(t) * {f}", "inner = lambda t: t.mul_(0.7) + {f}")))
        )
        self.put(FLAT, self.text("inner({F})"))

    def attribute(self) -> None:
        """A tensor that is kept on the module: made once, or of this call."""
        if self.random.random() < 0.5:
            self.say("if self.mask is None:")
            self.say("    self.mask = torch.linspace(0.5, 1.0, 6)")
            self.put(FLAT, self.text("{f} * self.mask"))
        else:
            self.say(self.text("self.last = {f}"))
            self.put(FLAT, self.text("self.last * 0.5"))

    def part(self) -> None:
        """A call of a sub-module that is drawn, too, or of one that was called before."""
        if not self.parts or self.random.random() < 0.7:
            attribute = f"{self.name.lower()}{len(self.parts)}"
            inner = Drawer(self.random, attribute.title(), self.depth - 1)
            inner.draw(self.random.randint(1, 6))
            template, reads = self.random.choice(PARTS)
            self.ahead.append(inner.source(inner.returned(template)))
            self.parts.append((attribute, reads))
        attribute, reads = self.random.choice(self.parts)
        self.put(FLAT, self.text(f"self.{attribute}({{f}}, {{f}}){reads}"))

    def returned(self, template: str) -> str:
        """What the forward returns."""
        flat = self.values[FLAT]
        main = flat[-1] if flat[-1] not in "xy" else "self.c(x)"
        return self.text(template.replace("{side}", self.random.choice(SIDES)), main=main)


def draw(random_: random.Random, name: str) -> Drawn:
    """One module; every third holds modules that are drawn, two levels deep."""
    drawer = Drawer(random_, "Drawn", random_.choice((0, 0, 2)))
    drawer.draw(random_.randint(2, 14))
    return Drawn(drawer.source(drawer.returned(random_.choice(OUTPUTS))), name)
