r"""LaTeX of a program: variables with their sets, objective and constraints, the Lagrangian, a method's step.

In: a `Program`, perhaps a method's options. Out: text to \input into a paper (amsmath, amssymb), or a whole
document. Invariant: all that is written is in the program; the symbols are those of the package's documentation,
f_k, h_k, r_k = f_{k-1}(h_{k-1}) - h_k, lambda_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from lagcompile.export.latex_terms import (
    Group,
    coupling_lines,
    definitions,
    groups,
    regularisers,
    weight_lines,
)
from lagcompile.ir.base import Frozen, ProgramError
from lagcompile.ir.domains import NonNegative
from lagcompile.ir.program import DataVariable, Program, StateVariable, ValueConstraint
from lagcompile.ir.symbols import Symbols, between, code, count, space, text
from lagcompile.ir.tex import number

HEAD = "% lagcompile: needs amsmath and amssymb"


def latex(program: Program, method: Frozen | None = None, *, document: bool = False) -> str:
    r"""Write the mathematics of a program as LaTeX.

    Args:
        program: the program.
        method: options of a method, such as `lc.Extragradient()`, whose step is written too.
        document: a document that compiles as it is; else text for \input.

    Raises:
        ProgramError: no formulas are known for the method.
    """
    symbols = Symbols(program)
    lines = [HEAD, *_variables(symbols), *_program(symbols), *_lagrangian(symbols)]
    if method is not None:
        lines += _method(symbols, method)
    body = "\n".join(lines) + "\n"
    if not document:
        return body
    head = "\\documentclass{article}\n\\usepackage[margin=2.5cm]{geometry}\n\\usepackage{amsmath,amssymb}\n"
    return f"{head}\\begin{{document}}\n{body}\\end{{document}}\n"


def _method(symbols: Symbols, method: Frozen) -> list[str]:
    kind = str(getattr(method, "kind", type(method).__name__))
    tex: Callable[[Symbols], list[str]] | None = getattr(method, "tex", None)
    if tex is None:
        raise ProgramError(f"no LaTeX is known for the method '{kind}'")
    return [rf"\paragraph{{Method: {kind.replace('_', ' ')}.}}", *tex(symbols)]


# ---------------------------------------------------------------- variables
def _variables(symbols: Symbols) -> Iterator[str]:
    program = symbols.program
    yield rf"\paragraph{{Variables of {code(program.name)}.}}"
    yield r"\begin{center}\renewcommand{\arraystretch}{1.3}\begin{tabular}{lll}"
    yield r"symbol & set & meaning \\ \hline"
    for d in program.data:
        own = "" if len(d.name) == 1 or len(program.data) > 1 else f" ({code(d.name)})"
        yield _row(symbols.value(d.name), space(symbols.data[d.name]), _data(d) + own)
    yield from _weight_rows(symbols)
    for group in groups(symbols):
        yield from _state_rows(symbols, group)
    yield r"\end{tabular}\end{center}"
    shared = [w for w in program.weights if sum(w.name in s.weights for s in program.stages) > 1]
    for w in shared:
        readers = ", ".join(f"\\theta_{{{s.name.removeprefix('f')}}}" for s in program.stages if w.name in s.weights)
        yield f"The weight {code(w.name)} is one variable, read by ${readers}$."
    tied = [w for w in program.weights if w.aliases]
    for w in tied:
        yield (
            f"It is also called {', '.join(code(a) for a in w.aliases)}."
            if w in shared
            else (f"The weight {code(w.name)} is also called {', '.join(code(a) for a in w.aliases)}.")
        )


def _weight_rows(symbols: Symbols) -> Iterator[str]:
    """Weights by stage; three or more consecutive stages with as many numbers each are one row."""
    weights = {w.name: w for w in symbols.program.weights}
    stages = [s for s in symbols.program.stages if s.weights]
    for total, run in groupby(stages, key=lambda s: sum(weights[w].type.count or 0 for w in s.weights)):
        members = list(run)
        numbers = [int(s.name.removeprefix("f")) for s in members]
        joined = len(members) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
        for group in [members] if joined else [[s] for s in members]:
            own = [weights[w] for w in dict.fromkeys(w for s in group for w in s.weights)]
            frozen = [w.name for w in own if not w.trainable]
            note = "" if not frozen else ", all constant" if len(frozen) == len(own) else f", constant: {_few(frozen)}"
            symbol, function, span = symbols.weights(group[0]), symbols.function(group[0]), ""
            if len(group) > 1:
                symbol, function = r"\theta_{k}", "f_{k}"
                span = rf", $k = {numbers[0]}, \dots, {numbers[-1]}$"
            meaning = f"weights of ${function}$: {_few([w.name for w in own])}{note}{span}"
            yield _row(symbol, rf"\mathbb{{R}}^{{{count(total)}}}", meaning)


def _row(symbol: str, where: str, meaning: str) -> str:
    return rf"${symbol}$ & ${where}$ & {meaning} \\"


def _data(d: DataVariable) -> str:
    if not d.free:
        return "data"
    bounds = ""
    if d.lower is not None or d.upper is not None:
        low = "-\\infty" if d.lower is None else number(d.lower)
        high = "\\infty" if d.upper is None else number(d.upper)
        bounds = f", in $[{low}, {high}]$"
    return f"input, a variable{bounds}"


def _few(names: Sequence[str]) -> str:
    shown = [code(n) for n in names]
    return ", ".join(shown) if len(shown) <= 3 else rf"{shown[0]}, \dots, {shown[-1]} ({len(shown)} tensors)"


def _state_rows(symbols: Symbols, group: Group) -> Iterator[str]:
    state, multiplier = group.first, group.multiplier
    places = code(state.node) if not group.general else f"{code(state.node)}, \\dots, {code(group.last.node)}"
    after = f"after {places}"
    span = f", ${group.span}$" if group.general else ""
    for part in state.storage.parts:
        where = space(state.type, NonNegative() if part.positive else None)
        yield _row(group.of(part.letter, "(c)"), where, f"{part.meaning} of class $c$ {after}{span}")
    yield _row(group.value(), symbols.set_of(state), f"{state.storage.noun} {after}{span}{_whose(state)}")
    if multiplier is not None:
        where = space(state.type) if multiplier.laid.per_feature else r"\mathbb{R}"
        if group.signed:
            where = where.replace(r"\mathbb{R}", r"\mathbb{R}_{\ge 0}")
        start = "starts at zero" if multiplier.start == "zero" else "starts at the adjoint"
        yield _row(group.dual(), where, f"multiplier{multiplier.laid.words}, {start}{span}")


def _whose(state: StateVariable) -> str:
    if not state.storage.whose:
        return ""
    return f", {state.storage.whose}" + (f", starts at {state.start.tex}" if state.storage.variable else "")


# ---------------------------------------------------------------- the program
def _program(symbols: Symbols) -> Iterator[str]:
    program = symbols.program
    yield r"\paragraph{Program.}"
    yield r"\begin{align*}"
    free = [symbols.bare(d.name) for d in program.data if d.free]
    over = [r"\theta" if program.weights else "", *free]
    over += [letter for s in symbols.variables() for letter in s.storage.letters]
    yield rf"\min_{{{', '.join(dict.fromkeys(o for o in over if o))}}} \quad & {objective(symbols)} \\"
    lines = list(_constraints(symbols))
    yield from _joined(
        ["\\text{subject to} \\quad & " + line if i == 0 else "& " + line for i, line in enumerate(lines)]
    )
    yield r"\end{align*}"
    where = definitions(symbols)
    if where:
        yield "Here " + "; ".join(where) + "."
    outputs = list(_outputs(symbols))
    if outputs:
        yield f"The output is {', '.join(outputs)}."


def _joined(lines: Sequence[str]) -> Iterator[str]:
    for i, line in enumerate(lines):
        yield line + (r" \\" if i + 1 < len(lines) else "")


def objective(symbols: Symbols, batch: str = "N") -> str:
    """Write what is minimised, as a sum over examples or over samples of the classes."""
    program = symbols.program
    synthetic = any(r in symbols.synthetic for r in program.objective.reads)
    mean = program.objective.reduction == "mean"
    reads = ", ".join(symbols.value(r) for r in program.objective.reads)
    loss = rf"\ell_{{\mathrm{{{text(program.objective.loss)}}}}}" if program.objective.loss != "loss" else r"\ell"
    if synthetic:
        scale = r"\frac{1}{M S} " if mean else ""
        total = rf"{scale}\sum_{{c=1}}^{{M}} \sum_{{n=1}}^{{S}} {loss}\bigl({reads},\, c\bigr)"
    else:
        scale = rf"\frac{{1}}{{{batch}}} " if mean else ""
        total = rf"{scale}\sum_{{i=1}}^{{{batch}}} {loss}\bigl({reads},\, y^{{(i)}}\bigr)"
    return total + regularisers(symbols, batch)


def _constraints(symbols: Symbols) -> Iterator[str]:
    program = symbols.program
    made: set[str] = set()
    for group in groups(symbols):
        state = group.first
        if not state.storage.variable:
            yield rf"{group.value()} = {group.prediction()}{group.range_of()}"
            continue
        assert group.constraint is not None
        inner = group.constraint.transform.tex(group.defect())
        relation = "=" if group.constraint.relation == "==" else r"\le"
        yield rf"{inner} {relation} 0, \qquad {group.defect()} = {group.definition()}{group.range_of()}"
        yield from filter(None, [state.storage.value_tex(group.value(), group.of)])
        where = symbols.set_of(state)
        if where != space(state.type):
            yield rf"{group.value()} \in {where}{group.range_of()}"
        made.add(state.name)
    for d in program.data:
        if d.free and (d.lower is not None or d.upper is not None):
            yield between(d.lower, symbols.value(d.name), d.upper)
    for c in program.constraints:
        if isinstance(c, ValueConstraint):
            yield _value_constraint(symbols, c)
    for name in program.objective.reads:
        if name in symbols.writer and name not in symbols.states:
            yield f"{symbols.value(name)} = {symbols.call(symbols.writer[name], name)}"


def _value_constraint(symbols: Symbols, c: ValueConstraint) -> str:
    weights = {w.name for w in symbols.program.weights}
    reads = ", ".join(rf"\theta_{{\mathrm{{{text(r)}}}}}" if r in weights else symbols.value(r) for r in c.reads)
    if c.function is None:
        return between(c.lower, reads, c.upper)
    name = c.function.rpartition(":")[2]
    relation = "=" if c.relation == "==" else r"\le"
    return rf"\mathrm{{{text(name)}}}\bigl({reads}\bigr) {relation} 0"


def _outputs(symbols: Symbols) -> Iterator[str]:
    program = symbols.program
    for name in program.objective.reads:
        kept = name in symbols.states
        yield f"${symbols.value(name)}$ ({code(name)})" if not kept else f"${symbols.value(name)}$"
    sampling = next((s.storage.sampling for s in program.states if s.storage.sampling is not None), None)
    if sampling is not None:
        noise = "drawn anew in each step" if sampling.fresh else "drawn once"
        yield (
            f"there are $M = {program.classes}$ classes with $S = {sampling.size}$ samples each, their noise "
            f"{noise}; $y^{{(i)}}$ is the class of example $i$"
        )


# ---------------------------------------------------------------- the Lagrangian
def _lagrangian(symbols: Symbols) -> Iterator[str]:
    terms = coupling_lines(symbols)
    if not terms:
        return
    mean = symbols.program.objective.reduction == "mean"
    yield r"\paragraph{Lagrangian.}"
    yield r"\begin{align*}"
    yield rf"\mathcal{{L}} = {{}} & {objective(symbols, 'B')} \\"
    yield from _joined([f"& {{}} + {t}" for t in terms])
    yield r"\end{align*}"
    over = "a batch of $B$ examples" if mean else "$B$ examples"
    weights = weight_lines(symbols)
    yield f"Sums over $i$ run over {over}{'; ' + '; '.join(weights) if weights else ''}."
    plain = [
        c
        for c in symbols.program.defects
        if c.transform.identity and c.scaled == "no" and symbols.program.multiplier_of(c.name) is not None
    ]
    full = [m for m in symbols.program.multipliers if m.layout == "full"]
    if plain and len(plain) == len(symbols.program.defects) and len(full) == len(symbols.program.multipliers):
        gradient = r"\partial \ell^{(i)} / \partial h_k^{(i)}"
        yield (
            "A defect is prediction minus state, so that at a stationary point without defects the multipliers are "
            rf"backpropagation's adjoints: $\lambda_k^{{(i)}} = {gradient}$."
        )
