"""Seeded mutants of some files.

In: paths, a seed. Out: `Mutant`s, each one change of one line by an operator of cosmic-ray. Invariant: a mutant is
valid Python and another program: changes of annotations are left out; no place is changed twice.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

TRIVIAL = ("BitAnd", "BitOr", "BitXor", "LShift", "RShift")
"""Operators that floating-point numbers do not have: any test that runs the line would notice."""


@dataclass(frozen=True)
class Mutant:
    """One change: the file, the first line of the changed statement, the text of the changed file, and the change."""

    path: str
    line: int
    source: str
    change: str

    @property
    def name(self) -> str:
        """The change in one line, independent of the line's number."""
        return f"{self.path}: {self.change}"


def draw(root: Path, paths: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Draw places of the code, each as likely as any other, and for each place one change.

    Places are ranked by a digest of their text, so that most of them stay as they are when code elsewhere changes.

    Args:
        root: folder that the paths start from.
        paths: files to change.
        count: how many mutants.
        seed: of the draw.
    """
    places = [(_rank(seed, path, place), path, ways) for path in paths for place, ways in _places(root / path)]
    found: dict[str, Mutant] = {}
    for _, path, ways in sorted(places):
        ranked = sorted(ways, key=lambda way: _rank(seed, path, way))
        mutant = next(filter(None, (_mutant(root, path, *way) for way in ranked)), None)
        if mutant is not None:
            found.setdefault(mutant.name, mutant)
        if len(found) == count:
            break
    return list(found.values())


def _rank(*parts: object) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def _places(path: Path) -> list[tuple[tuple[str, int, int], list[tuple[str, int]]]]:
    """Where a file can be changed (text of the line, its how manieth, place in it), and the operators that do it."""
    code = path.read_text()
    nodes, lines = list(ast_nodes(get_ast(code))), [line.strip() for line in code.splitlines()]
    ways: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or name.endswith(TRIVIAL):  # the first need the names of variables
            continue
        for occurrence, (start, _) in enumerate(p for node in nodes for p in operator().mutation_positions(node)):
            ways.setdefault(start, []).append((name, occurrence))
    indents = [len(line) - len(line.lstrip()) for line in code.splitlines()]
    return [
        ((lines[at - 1], lines[: at - 1].count(lines[at - 1]), column - indents[at - 1]), found)
        for (at, column), found in ways.items()
    ]


def _mutant(root: Path, path: str, name: str, occurrence: int) -> Mutant | None:
    code = (root / path).read_text()
    changed = mutate_code(code, get_operator(name)(), occurrence)
    if changed is None or _meaning(changed) in (None, _meaning(code)):
        return None
    lines = list(difflib.unified_diff(code.splitlines(), changed.splitlines(), n=0, lineterm=""))
    at = int(lines[2].split()[1].split(",")[0].lstrip("-"))
    text = "  ->  ".join(" ".join(line[1:].split()) for line in lines[3:])
    return Mutant(path, _statement(code, max(at, 1)), changed, text)


def _statement(code: str, line: int) -> int:
    """Find where the innermost statement that a line belongs to begins: tests that end it early run that line alone."""
    found = (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.stmt))
    return max((n.lineno for n in found if n.lineno <= line <= (n.end_lineno or line)), default=line)


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
            case ast.AnnAssign():
                node.annotation = ast.Constant(None)
            case ast.ImportFrom():
                node.names = sorted(node.names, key=lambda a: a.name)
    return ast.dump(tree)
