"""Seeded mutants of some files.

In: paths, a seed. Out: `Mutant`s, each one change of one line by an operator of cosmic-ray. Invariant: a mutant is
valid Python and another program: changes of annotations are left out.
"""

from __future__ import annotations

import ast
import difflib
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

TRIVIAL = ("BitAnd", "BitOr", "BitXor", "LShift", "RShift")
"""Operators that floating-point numbers do not have: any test that runs the line would notice."""


@dataclass(frozen=True)
class Mutant:
    """One change: the file, the first line that differs, and the text of the changed file."""

    path: str
    line: int
    operator: str
    source: str
    change: str

    @property
    def name(self) -> str:
        """The change in one line, independent of the line's number."""
        return f"{self.path}: {self.change}"


def draw(root: Path, paths: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Draw mutants without repetition, each file in proportion to its possible changes.

    Args:
        root: folder that the paths start from.
        paths: files to change.
        count: how many mutants.
        seed: of the draw.
    """
    places = [(p, name, i) for p in paths for name, number in _counts((root / p).read_text()) for i in range(number)]
    random.Random(seed).shuffle(places)
    found: dict[str, Mutant] = {}
    for path, name, occurrence in places:
        mutant = _mutant(root, path, name, occurrence)
        if mutant is not None:
            found.setdefault(mutant.name, mutant)
        if len(found) == count:
            break
    return list(found.values())


def _counts(code: str) -> Iterator[tuple[str, int]]:
    """Each operator with the number of places that it can change."""
    nodes = list(ast_nodes(get_ast(code)))
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or name.endswith(TRIVIAL):  # the first need the names of variables
            continue
        yield name, sum(1 for node in nodes for _ in operator().mutation_positions(node))


def _mutant(root: Path, path: str, name: str, occurrence: int) -> Mutant | None:
    code = (root / path).read_text()
    changed = mutate_code(code, get_operator(name)(), occurrence)
    if changed is None or _meaning(changed) in (None, _meaning(code)):
        return None
    lines = list(difflib.unified_diff(code.splitlines(), changed.splitlines(), n=0, lineterm=""))
    at = int(lines[2].split()[1].split(",")[0].lstrip("-"))
    text = "  ->  ".join(" ".join(line[1:].split()) for line in lines[3:])
    return Mutant(path, max(at, 1), name.rsplit("/", maxsplit=1)[-1], changed, text)


def _meaning(code: str) -> str | None:
    """The program without annotations; None where the compiler refuses it or warns."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(code, "", "exec")
        tree = ast.parse(code)
    except (SyntaxError, SyntaxWarning):
        return None
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef():
                node.returns = None
            case ast.arg():
                node.annotation = None
            case ast.AnnAssign(value=ast.expr()):
                node.annotation = ast.Constant(None)
            case ast.ImportFrom():
                node.names = sorted(node.names, key=lambda a: a.name)
    return ast.dump(tree)
