"""One new transform, storage, step rule and method, as edits of a copy of the package: text put ahead of an anchor.

In: the package's folder. Out: `extended`, a copy in which `kind: arsinh`, `halved`, `sign` and `ascent_first` exist.
Invariant: each addition edits the files that its room names, and no other: that is what the test is about.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import lagcompile

Edits = dict[str, list[tuple[str, str]]]

TRANSFORM: Edits = {
    "ir/transforms.py": [
        (
            "def _signed_excess(",
            '''class Arsinh(_Transform):
    """G(r) = arsinh(r): a multiplier's pull fades where the defect is large."""

    augmentable = False
    kind: Literal["arsinh"] = "arsinh"

    def text(self, r: str) -> str:
        """Return G(r) as plain text."""
        return f"arsinh({r})"

    def tex(self, r: str) -> str:
        """Return G(r) as TeX."""
        return rf"\\operatorname{{arsinh}}\\bigl({r}\\bigr)"

    def tex_excess(self, r: str, dual: str, rho: str) -> str:
        """Return r: there is no tube."""
        return r


''',
        ),
        ("| NormTube, Field(", "| Arsinh "),
    ],
    "runtime/transforms.py": [
        (
            "@lru_cache\ndef behaviour(",
            """class _Arsinh(_Signed):
    def value(self, r: Tensor) -> Tensor:
        return torch.asinh(r)

    def pull(self, g: Tensor, multiplier: Tensor, r: Tensor) -> Tensor:
        return multiplier / (1.0 + r * r).sqrt()


""",
        ),
        ("    assert_never(transform)", "        case Arsinh():\n            return _Arsinh()\n"),
        ("AbsTube, Hardshrink, Identity", "Arsinh, "),
    ],
}

STORAGE: Edits = {
    "ir/storages.py": [
        (
            "class ClassGaussian(",
            '''class Halved(_Storage):
    """A row for each example that holds half the state's value."""

    per_example = True
    letter = "N"
    whose = "half of it kept for each example"
    kind: Literal["halved"] = "halved"


''',
        ),
        ("| Shared, Field(", "| Halved "),
    ],
    "runtime/storages.py": [
        (
            "class _Gaussian(Keeping)",
            """class _Halved(Keeping):
    def stored(self, values: Tensor) -> Tensor:
        return 0.5 * super().stored(values)

    def project(self, stored: Tensor) -> Tensor:
        return 0.5 * super().project(2.0 * stored)

    def values(self, stored: Tensor, labels: Tensor | None, noise: Tensor | None) -> Tensor:
        return super().values(2.0 * stored, labels, noise)

    def named(self, name: str, stored: Tensor) -> dict[str, Tensor]:
        return super().named(name, 2.0 * stored)


""",
        ),
        ("    assert_never(storage)", "        case Halved():\n            return _Halved(storage, domain)\n"),
        ("Shared, Storage, Table", "Halved, "),
    ],
}

RULE: Edits = {
    "runtime/rules.py": [
        (
            "Rule = SGD",
            '''class Sign(_Rule):
    """x - lr sign(mean of the gradients) / sqrt(number of moves)."""

    kind: Literal["sign"] = "sign"

    def slots(self) -> tuple[str, ...]:
        """Return the mean of the gradients."""
        return ("mean",)

    def counts(self) -> tuple[str, ...]:
        """Return the number of moves."""
        return ("moves",)

    def move(self, values: Tensors, gradients: Tensors, slots: Slots, lr: float) -> None:
        """Move values in place."""
        self.shrink(values, lr)
        torch._foreach_add_(slots["moves"], 1.0)
        torch._foreach_lerp_(slots["mean"], gradients, 0.5)
        for value, mean, moves in zip(values, slots["mean"], slots["moves"], strict=True):
            value.sub_(lr * mean.sign() / moves.sqrt())

    def tex(self) -> str:
        """Return the rule in words."""
        return f"sign of the mean gradient ({self._rate()})"


''',
        ),
        ("SGD | Adagrad | Adam\n", "Sign | "),
    ],
}

METHOD: Edits = {
    "backends/ascent_first.py": [
        (
            "",
            '''from __future__ import annotations

from typing import Literal

from torch import Tensor

from lagcompile.backends.first_order import FirstOrder, FirstOrderExecutor
from lagcompile.runtime.instance import Instance


class AscentFirst(FirstOrder):
    """Multipliers climb ahead of the descent in states and weights, which sees where they are."""

    scheme = "descent"
    moves = (
        r"\\lambda^{t+1} &= <\\lambda^t + A \\nabla_\\lambda \\mathcal{L}>",
        r"z^{t+1} &= <z^t - A F(z^t, \\lambda^{t+1})>",
    )
    kind: Literal["ascent_first"] = "ascent_first"

    def executor(self, instance: Instance, *, seed: int = 0) -> AscentFirstExecutor:
        """Executor of this method on an instance."""
        return AscentFirstExecutor(instance, self, seed=seed)


class AscentFirstExecutor(FirstOrderExecutor):
    """Runs it."""

    def step(self, rows: Tensor) -> None:
        """Make one ascent, then one descent."""
        batch = self.instance.batch(rows)
        self.store.begin(batch, self.steps)
        self.inputs.begin(batch)
        self.store.update(self._look(batch, weights=False), "multipliers")
        last = self._gradients(batch, weights=True)
        self._set_gradients(last)
        self.optimizers["weights"].step()
        self.store.update(last, "states")
        self._last, self._batch = last, batch
        self.store.finish()
        self.steps += 1
''',
        )
    ],
    "workbench/methods.py": [
        ("    | MixedInteger,", "    | AscentFirst\n"),
        (
            "from lagcompile.backends.augmented",
            "from lagcompile.backends.ascent_first import AscentFirst\n",
        ),
    ],
}


def extended(folder: Path) -> Path:
    """Copy the package into a folder, with all four additions."""
    package = folder / "lagcompile"
    shutil.copytree(Path(lagcompile.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for edits in (TRANSFORM, STORAGE, RULE, METHOD):
        for name, additions in edits.items():
            path = package / name
            text = path.read_text() if path.exists() else ""
            for anchor, addition in additions:
                assert text.count(anchor) == 1 or not text, (name, anchor)
                text = text.replace(anchor, addition + anchor) if text else addition
            path.write_text(text)
    return folder
