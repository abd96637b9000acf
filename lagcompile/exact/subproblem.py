"""Quadratic subproblems, modelled in cvxpy once for each sparsity pattern.

In: `QuadraticData`. Out: `QuadraticSolution`. All data are cvxpy Parameters of fixed sparsity (DPP), so that
canonicalisation happens once. Going through cvxpy's parameter tensors would still cost more than a small subproblem
itself; therefore the compiled problem is asked once, with every parameter entry set to a different number, where
each entry ends up in the solver's data, and afterwards values are written there directly. Invariant: that map was
verified against cvxpy on random parameter values, or is not used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lagcompile.exact.linear import Indices, Vector, largest
from lagcompile.exact.model import Kinds, QuadraticModel
from lagcompile.exact.quadratic import Outcome, QuadraticData, QuadraticSolution
from lagcompile.exact.sparsity import Pattern
from lagcompile.ir.alone import without_warnings


@dataclass(frozen=True)
class _Place:
    """Where parameter entries sit in one of the solver's arrays: array[position] = sign * source[index]."""

    name: str
    position: Indices
    index: Indices
    sign: Vector


LARGEST_ENTRY = 1e25  # beyond it solvers take numbers for infinities

_MATRICES = ("P", "A", "F")
_VECTORS = ("c", "q", "b", "G")


class Subproblem:
    """One cvxpy problem for subproblems of equal sparsity.

    Args:
        example: data whose patterns (and kinds of bounds) are to be modelled.
        solver: "clarabel" or "osqp".
        direct: write into the compiled data; False goes through `Problem.solve`.
        patterns: patterns to include besides those of the example.
    """

    def __init__(
        self,
        example: QuadraticData,
        *,
        solver: str,
        direct: bool = True,
        patterns: tuple[Pattern, Pattern, Pattern] | None = None,
    ) -> None:
        begin = time.perf_counter()
        found = (Pattern.of(example.H), Pattern.of(example.E), Pattern.of(example.I))
        if patterns is not None:
            found = (found[0].union(patterns[0]), found[1].union(patterns[1]), found[2].union(patterns[2]))
        self.patterns = found
        self.solver = solver
        kinds = Kinds.of(example.lower, example.upper)
        self._model = QuadraticModel(found, kinds, elastic=example.weights is not None)
        self._places: list[_Place] = []
        self._compile()
        self.direct = direct and self._verify()
        self.seconds = time.perf_counter() - begin

    def fits(self, data: QuadraticData) -> bool:
        """Whether the data have this problem's kinds of bounds (sparsity is checked by `solve`)."""
        elastic = data.weights is not None
        return elastic == self._model.elastic and self._model.kinds.same_as(Kinds.of(data.lower, data.upper))

    def source(self, data: QuadraticData) -> Vector | None:
        """All parameter values in one vector; None when an entry lies outside of the patterns."""
        values = [p.values(m) for p, m in zip(self.patterns, (data.H, data.E, data.I), strict=True)]
        if any(part is None for part in values):
            return None
        kinds = self._model.kinds
        bounds = np.concatenate([data.lower[kinds.fixed], data.lower[kinds.lower], data.upper[kinds.upper]])
        weights = np.zeros(0) if data.weights is None else data.weights
        return np.concatenate([values[0], data.g, values[1], data.e, values[2], data.i, bounds, weights])

    def solve(self, source: Vector, *, time_limit: float) -> QuadraticSolution:
        """Solve for the parameter values that `source` returned."""
        options = _solver_options(self.solver, time_limit)
        if not self.direct:
            return self._solve_modelled(source, options)
        for place in self._places:
            array = self._arrays[place.name]
            array[place.position] = place.sign * source[place.index]
        if max((largest(array) for array in self._arrays.values()), default=0.0) > LARGEST_ENTRY:
            return self._empty(Outcome.FAILED)
        raw = self._chain.solve_via_data(self.problem, self._data, warm_start=False, verbose=False, solver_opts=options)
        outcome, primal, dual = _read(self.solver, raw)
        if outcome is not Outcome.OPTIMAL:
            return self._empty(outcome)
        return self._unpack(primal[self._columns], dual[self._rows] * self._row_signs)

    # compilation

    def _tags(self) -> Vector:
        """Distinct numbers from 2 on (cvxpy's own entries are 0 and 1); symmetric in H."""
        tags = 2.0 + np.arange(sum(self._model.lengths), dtype=float)
        H = self.patterns[0]
        mirrored = H.matrix(tags[: H.count]).T
        mirror = H.values(mirrored.tocsc())
        if mirror is None:
            raise AssertionError("the Hessian pattern is not symmetric")
        tags[: H.count] = np.minimum(tags[: H.count], mirror)
        return tags

    def _canonicalise(self, source: Vector) -> tuple[Any, Any]:
        import cvxpy as cp

        name = {"clarabel": cp.CLARABEL, "osqp": cp.OSQP}[self.solver]
        self.problem = self._model.write(source).problem
        with without_warnings(RuntimeWarning):  # cvxpy warns about reading its own sparse parameters
            data, chain, _ = self.problem.get_problem_data(solver=name)
        return data, chain

    def _compile(self) -> None:
        tags = self._tags()
        data, self._chain = self._canonicalise(tags)
        self._data = data
        self._arrays: dict[str, Vector] = {}
        for name in _MATRICES + _VECTORS:
            if name not in data or data[name] is None:
                continue
            array = data[name].data if name in _MATRICES else data[name]
            if name in _MATRICES:
                data[name] = data[name].copy()
                array = data[name].data
            else:
                array = np.array(array, dtype=float)
                data[name] = array
            self._arrays[name] = array
            self._places.append(_locate(name, array))
        self._map_rows()

    def _map_rows(self) -> None:
        """From the tags in the constant terms: the solver's row (and sign) of each of our constraints."""
        n, m, k = self._model.sizes
        lengths = self._model.lengths
        start = np.cumsum([0, *lengths])
        linear = self._arrays["c" if "c" in self._arrays else "q"]
        self._columns = _find(linear, start[1] + np.arange(n))[0]
        constants = np.concatenate([self._arrays[name] for name in ("b", "G") if name in self._arrays])
        wanted = np.concatenate(
            [start[3] + np.arange(m), start[5] + np.arange(k), start[6] + np.arange(sum(lengths[6:9]))]
        )
        self._rows, signs = _find(constants, wanted)
        self._row_signs = signs.copy()
        self._row_signs[: m + k] *= -1.0

    def _verify(self) -> bool:
        """Compare directly written data with cvxpy's own on random values."""
        random = np.random.default_rng(1).uniform(0.5, 1.5, sum(self._model.lengths))
        H = self.patterns[0]
        mirror = H.values(H.matrix(random[: H.count]).T.tocsc())
        if mirror is not None:
            random[: H.count] += mirror
        for place in self._places:
            self._arrays[place.name][place.position] = place.sign * random[place.index]
        expected, _ = self._canonicalise(random)
        for name, array in self._arrays.items():
            other = expected[name].data if name in _MATRICES else np.asarray(expected[name])
            if other.shape != array.shape or not np.allclose(other, array, rtol=1e-12, atol=1e-12):
                return False
            if name in _MATRICES and not np.array_equal(expected[name].indices, self._data[name].indices):
                return False
        return True

    # solving and unpacking

    def _solve_modelled(self, source: Vector, options: dict[str, Any]) -> QuadraticSolution:
        import cvxpy as cp

        written = self._model.write(source)
        name = {"clarabel": cp.CLARABEL, "osqp": cp.OSQP}[self.solver]
        with without_warnings():
            try:
                written.problem.solve(solver=name, warm_start=False, **options)
            except cp.SolverError:
                return self._empty(Outcome.FAILED)
        status = written.problem.status
        if status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
            infeasible = status in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE)
            unbounded = status in (cp.UNBOUNDED, cp.UNBOUNDED_INACCURATE)
            return self._empty(Outcome.INFEASIBLE if infeasible else Outcome.UNBOUNDED if unbounded else Outcome.FAILED)
        duals = [np.atleast_1d(row.dual_value) for row in written.rows]
        if self._model.lengths[7]:  # cvxpy's multipliers of lower bounds are positive, ours are negative
            place = len(duals) - 1 - (self._model.lengths[8] > 0)
            duals[place] = -duals[place]
        return self._unpack(
            np.asarray(written.step.value, dtype=float), np.concatenate(duals) if duals else np.zeros(0)
        )

    def _unpack(self, d: Vector, duals: Vector) -> QuadraticSolution:
        n, m, k = self._model.sizes
        bounds = np.zeros(n)
        start = m + k
        kinds = self._model.kinds
        for mask in (kinds.fixed, kinds.lower, kinds.upper):
            count = int(mask.sum())
            bounds[mask] += duals[start : start + count]
            start += count
        return QuadraticSolution(Outcome.OPTIMAL, d, duals[:m], duals[m : m + k], bounds)

    def _empty(self, outcome: Outcome) -> QuadraticSolution:
        n, m, k = self._model.sizes
        return QuadraticSolution(outcome, np.zeros(n), np.zeros(m), np.zeros(k), np.zeros(n))


def _locate(name: str, array: Vector) -> _Place:
    size = np.abs(array)
    position = np.flatnonzero(size > 1.5)
    return _Place(name, position, np.rint(size[position]).astype(np.intp) - 2, np.sign(array[position]))


def _find(array: Vector, wanted: Indices) -> tuple[Indices, Vector]:
    """Positions and signs of the tagged entries `wanted` (source indices) in a solver's vector."""
    where = np.full(int(max(wanted.max(initial=0), np.abs(array).max(initial=0.0))) + 3, -1, dtype=np.intp)
    tagged = np.flatnonzero(np.abs(array) > 1.5)
    where[np.rint(np.abs(array[tagged])).astype(np.intp) - 2] = tagged
    rows = where[wanted]
    if (rows < 0).any():
        raise AssertionError("cvxpy dropped a parameter from the compiled problem")
    return rows, np.sign(array[rows])


def _solver_options(solver: str, time_limit: float) -> dict[str, Any]:
    limit = max(time_limit, 1e-3)
    if solver == "clarabel":
        return {
            "tol_gap_abs": 1e-11,
            "tol_gap_rel": 1e-11,
            "tol_feas": 1e-11,
            "presolve_enable": False,
            "max_threads": 1,
            "time_limit": limit,
        }
    return {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 50_000, "polishing": False, "time_limit": limit}


def _read(solver: str, raw: Any) -> tuple[Outcome, Vector, Vector]:
    """Outcome, primal and dual vector from what the solver returned."""
    if solver == "clarabel":
        status = str(raw.status)
        if status in ("Solved", "AlmostSolved"):
            outcome = Outcome.OPTIMAL
        elif "PrimalInfeasible" in status:
            outcome = Outcome.INFEASIBLE
        elif "DualInfeasible" in status:
            outcome = Outcome.UNBOUNDED
        elif status == "InsufficientProgress" and max(raw.r_prim, raw.r_dual) < 1e-6:
            outcome = Outcome.OPTIMAL
        else:
            outcome = Outcome.FAILED
        return outcome, np.asarray(raw.x, dtype=float), np.asarray(raw.z, dtype=float)
    status = str(raw.info.status)
    if status.startswith("solved"):
        outcome = Outcome.OPTIMAL
    elif status.startswith("primal infeasible"):
        outcome = Outcome.INFEASIBLE
    elif status.startswith("dual infeasible"):
        outcome = Outcome.UNBOUNDED
    else:
        outcome = Outcome.FAILED
    return outcome, np.asarray(raw.x, dtype=float), np.asarray(raw.y, dtype=float)


class SubproblemCache:
    """Compiled subproblems by kind; recompiles when a pattern has grown or the kinds of bounds have changed.

    Args:
        solver: "clarabel" or "osqp".
        direct: as for `Subproblem`.
    """

    def __init__(self, *, solver: str, direct: bool) -> None:
        self._solver = solver
        self._direct = direct
        self._compiled: dict[bool, Subproblem] = {}
        self._known: dict[bool, tuple[Pattern, Pattern, Pattern]] = {}
        """Patterns of the last compilation, by whether it was elastic."""
        self.compilations = 0
        self.compilation_seconds = 0.0
        self.seconds = 0.0

    def state(self) -> dict[bool, Any]:
        """The patterns: a solver's rounding depends on them."""
        return {
            elastic: [(p.shape, p.rows, p.cols, p.offsets) for p in patterns]
            for elastic, patterns in self._known.items()
        }

    def load(self, state: Mapping[bool, Any]) -> None:
        """Compile for these patterns."""
        for elastic, (H, E, I) in state.items():  # noqa: E741
            self._known[elastic] = Pattern(*H), Pattern(*E), Pattern(*I)

    def solve(self, data: QuadraticData, *, time_limit: float) -> QuadraticSolution:
        """Solve one subproblem, compiling first when there is none that fits."""
        elastic = data.weights is not None
        compiled = self._compiled.get(elastic)
        source = compiled.source(data) if compiled is not None and compiled.fits(data) else None
        if compiled is None or source is None:
            compiled = Subproblem(data, solver=self._solver, direct=self._direct, patterns=self._known.get(elastic))
            self._compiled[elastic], self._known[elastic] = compiled, compiled.patterns
            self.compilations += 1
            self.compilation_seconds += compiled.seconds
            source = compiled.source(data)
            if source is None:
                raise AssertionError("a freshly compiled subproblem does not hold its own example")
        begin = time.perf_counter()
        solution = compiled.solve(source, time_limit=time_limit)
        self.seconds += time.perf_counter() - begin
        return solution
