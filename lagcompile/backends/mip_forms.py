"""A piecewise-linear function as affine forms in bounded variables, one new variable for each ReLU that may switch.

In: a traced ATen graph of one vector v with bounds. Out: `Forms`: every output as an affine form, and the list of
switches y = max(x, 0). Invariant: affine operations are applied to the columns of the form by running them, so that a
form is what the operation does; abs, max, clamp and leaky ReLU are written with ReLUs exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from lagcompile.backends.sqp_observe import FACTORS, FIXED, LINEAR
from lagcompile.frontend.graphmodule import attribute
from lagcompile.ir.base import ProgramError

Vector = NDArray[np.float64]
PIECEWISE = frozenset(
    "relu abs leaky_relu clamp clamp_min clamp_max hardtanh maximum minimum amax linalg_vector_norm".split()  # noqa: SIM905
)
"""Operations that are written with ReLUs."""


@dataclass(frozen=True)
class Form:
    """An affine form: value = columns[:, 1:] u + columns[:, 0], of a tensor shape; later variables have no column."""

    columns: Tensor
    shape: tuple[int, ...]

    def __add__(self, other: Form | Tensor | float) -> Form:
        """Sum with a form of the same shape, or a constant."""
        if isinstance(other, Form):
            width = max(self.columns.shape[1], other.columns.shape[1])
            return Form(_wide(self.columns, width) + _wide(other.columns, width), self.shape)
        shifted = self.columns.clone()
        shifted[:, 0] += torch.as_tensor(other, dtype=torch.float64).expand(self.shape).reshape(-1)
        return Form(shifted, self.shape)

    def times(self, factor: float) -> Form:
        """Product with a number."""
        return Form(self.columns * factor, self.shape)


@dataclass(frozen=True)
class Switch:
    """Variable number `index` is max(form, 0); the form lies in [lower, upper], which contains 0 inside."""

    index: int
    form: Vector
    lower: float
    upper: float


@dataclass
class Forms:
    """Variables u = (v, y_1, y_2, ...) with bounds, and the switches between them.

    Attributes:
        lower: lower bounds of u.
        upper: upper bounds of u.
        switches: in the order in which they were made.
        stable: ReLUs that cannot switch within the bounds.
        tighten: bound each switch by two linear programs over the relaxation so far.
    """

    lower: list[float]
    upper: list[float]
    tighten: bool = True
    switches: list[Switch] = field(default_factory=list)
    stable: int = 0

    def variables(self) -> Form:
        """Return the variables v as forms of themselves."""
        n = len(self.lower)
        return Form(torch.cat([torch.zeros(n, 1), torch.eye(n)], 1).double(), (n,))

    def run(self, graph: fx.GraphModule) -> tuple[Form, ...]:
        """The graph's outputs as forms.

        Raises:
            ProgramError: operations that are not piecewise linear.
        """
        values: dict[fx.Node, Any] = {}
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = self.variables()
            elif node.op == "get_attr":
                values[node] = attribute(graph, str(node.target)).detach()
            elif node.op == "output":
                return tuple(_form(values[a] if isinstance(a, fx.Node) else a) for a in node.args[0])
            else:
                args = fx.node.map_arg(node.args, lambda n: values[n])
                kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
                values[node] = self._call(node.target, args, kwargs)
        raise AssertionError("a graph without an output")

    def _call(self, target: Any, args: Any, kwargs: Any) -> Any:
        forms = _forms((args, kwargs))
        if not forms or str(target).startswith("<built-in function getitem"):
            return target(*args, **kwargs)
        name = str(target.overloadpacket).removeprefix("aten.")
        if name in {"detach", "alias", "lift_fresh", "clone"}:
            return args[0]
        if name in PIECEWISE:
            return self._piecewise(name, args, kwargs)
        if not _is_affine(name, args):
            raise ProgramError(f"the operation {name} is not piecewise linear in the variables")
        return _columnwise(target, args, kwargs, forms)

    # ---------------------------------------------------------------- switches
    def relu(self, form: Form) -> Form:
        """max(form, 0), with a new variable for each entry that may switch."""
        width = len(self.lower) + 1
        columns = _wide(form.columns, width)
        rows = []
        for row in columns:
            low, high = self._range(row.numpy())
            if low >= 0.0 or high <= 0.0:
                self.stable += 1
                rows.append(row if low >= 0.0 else torch.zeros_like(row))
                continue
            self.switches.append(Switch(len(self.lower), row.numpy().copy(), low, high))
            self.lower.append(0.0)
            self.upper.append(high)
            rows.append(torch.zeros(len(self.lower) + 1, dtype=torch.float64))
            rows[-1][len(self.lower)] = 1.0
        width = len(self.lower) + 1
        return Form(torch.stack([_wide(r[None], width)[0] for r in rows]), form.shape)

    def _range(self, row: Vector) -> tuple[float, float]:
        """Smallest and largest value of an affine form: by intervals, then by linear programs where that says more."""
        low, high = interval(row, np.array(self.lower), np.array(self.upper))
        if not self.tighten or low >= 0.0 or high <= 0.0 or not self.switches:
            return low, high
        return max(low, self._extreme(row, 1.0)), min(high, -self._extreme(row, -1.0))

    def _extreme(self, row: Vector, sign: float) -> float:
        """Minimum of sign * form over the relaxation, slightly lowered against the solver's tolerance."""
        from scipy.optimize import linprog

        n = len(self.lower)
        matrix, right = relaxation(self.switches, n)
        cost = np.zeros(n)
        cost[: len(row) - 1] = sign * row[1:]
        found = linprog(cost, A_ub=matrix, b_ub=right, bounds=np.stack([self.lower, self.upper], 1), method="highs")
        if found.status != 0:
            return -np.inf
        return float(found.fun + sign * row[0]) - 1e-7 * (1.0 + abs(float(found.fun)))

    def _piecewise(self, name: str, args: Any, kwargs: Any) -> Form:
        x = args[0]
        if name == "relu":
            return self.relu(x)
        if name == "abs":
            return self._abs(x)
        if name == "leaky_relu":
            slope = float(args[1]) if len(args) > 1 else 0.01
            return self.relu(x).times(1.0 - slope) + x.times(slope)
        if name in {"clamp", "clamp_min", "clamp_max", "hardtanh"}:
            return self._clamp(x, *_ends(name, args, kwargs))
        if name in {"maximum", "minimum"}:
            shape = tuple(torch.broadcast_shapes(_shape(args[0]), _shape(args[1])))
            first, second = (_expanded(v, shape) for v in args[:2])
            if name == "minimum":
                return self._max(first.times(-1.0), second.times(-1.0)).times(-1.0)
            return self._max(first, second)
        if name == "linalg_vector_norm":
            order = float(args[1]) if len(args) > 1 else 2.0
            if len(args) > 2 or kwargs or order not in {1.0, np.inf}:
                raise ProgramError("only norms of order 1 and infinity of a whole tensor are piecewise linear here")
            flat = self._abs(Form(x.columns, (x.columns.shape[0],)))
            if order == 1.0:
                return Form(flat.columns.sum(0, keepdim=True), ())
            return self._amax(flat, (), False)
        return self._amax(x, args[1] if len(args) > 1 else (), bool(args[2]) if len(args) > 2 else False)

    def _abs(self, x: Form) -> Form:
        return self.relu(x).times(2.0) + x.times(-1.0)

    def _max(self, a: Form, b: Form) -> Form:
        return self.relu(a + b.times(-1.0)) + b

    def _clamp(self, x: Form, low: float | None, high: float | None) -> Form:
        if low is not None:
            x = self.relu(x + (-low)) + low
        return x if high is None else (self.relu(x.times(-1.0) + high) + (-high)).times(-1.0)

    def _amax(self, x: Form, axes: Sequence[int], keep: bool) -> Form:
        """A tournament along the axes."""
        order = torch.arange(x.columns.shape[0]).reshape(x.shape)
        dims = [d % max(order.dim(), 1) for d in axes] or list(range(order.dim()))
        kept = [d for d in range(order.dim()) if d not in dims]
        groups = order.permute(*kept, *dims).reshape(-1, max(1, int(np.prod([x.shape[d] for d in dims]))))
        best = Form(x.columns[groups[:, 0]], (len(groups),))
        for j in range(1, groups.shape[1]):
            best = self._max(Form(x.columns[groups[:, j]], (len(groups),)), best)
        shape = tuple((1 if d in dims else s) for d, s in enumerate(x.shape) if keep or d not in dims)
        return Form(best.columns, shape)


def interval(row: Vector, lower: Vector, upper: Vector) -> tuple[float, float]:
    """Bounds of an affine form over a box."""
    a = row[1:]
    lower, upper = lower[: len(a)], upper[: len(a)]
    low = np.where(a > 0, a * lower, np.where(a < 0, a * upper, 0.0)).sum()
    high = np.where(a > 0, a * upper, np.where(a < 0, a * lower, 0.0)).sum()
    return float(row[0] + low), float(row[0] + high)


def relaxation(switches: Sequence[Switch], count: int) -> tuple[Any, Vector]:
    """M u <= m: the convex hull of each switch over its range (triangle relaxation)."""
    import scipy.sparse as sp

    rows, right = [], []
    for s in switches:
        x = np.zeros(count)
        x[: len(s.form) - 1] = s.form[1:]
        above = x.copy()
        above[s.index] -= 1.0
        slope = s.upper / (s.upper - s.lower)
        below = -slope * x
        below[s.index] += 1.0
        rows += [above, below]
        right += [-s.form[0], slope * (s.form[0] - s.lower)]
    return sp.csr_array(np.array(rows)), np.array(right)


def _columnwise(target: Callable[..., Any], args: Any, kwargs: Any, forms: Sequence[Form]) -> Any:
    """An affine operation applied to every column of its forms at once."""
    width = max(f.columns.shape[1] for f in forms)

    def at(column: int | None) -> Any:
        def pick(value: Any) -> Any:
            if not isinstance(value, Form):
                return value
            if column is None:
                return torch.zeros(value.shape, dtype=torch.float64)
            return _wide(value.columns, width)[:, column].reshape(value.shape)

        return target(*_map(pick, args), **_map(pick, kwargs))

    base, columns = at(None), [at(j) for j in range(width)]
    if isinstance(base, Tensor):
        return _joined(base, columns)
    return [_joined(b, [c[i] for c in columns]) for i, b in enumerate(base)]


def _joined(base: Tensor, columns: Sequence[Tensor]) -> Form:
    rest = [(c - base).reshape(-1) for c in columns[1:]]
    return Form(torch.stack([columns[0].reshape(-1), *rest], dim=1), tuple(base.shape))


def _is_affine(name: str, args: Any) -> bool:
    if name in LINEAR:
        return True
    tensors = [v for v in args if isinstance(v, Form | Tensor)]
    reached = [i for i, v in enumerate(tensors) if isinstance(v, Form)]
    if name in FACTORS:
        return sum(i in FACTORS[name] for i in reached) <= 1
    return name in FIXED and not any(i in FIXED[name] for i in reached)


def _ends(name: str, args: Any, kwargs: Any) -> tuple[float | None, float | None]:
    given = [*args[1:], *([None] * 2)]
    low, high = kwargs.get("min", given[0]), kwargs.get("max", given[1])
    if name == "clamp_max":
        low, high = None, given[0]
    if name == "clamp_min":
        high = None
    if name == "hardtanh" and len(args) == 1:
        low, high = -1.0, 1.0
    return low, high


def _forms(value: Any) -> list[Form]:
    found: list[Form] = []
    _map(lambda v: found.append(v) if isinstance(v, Form) else None, value)
    return found


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_map(function, v) for v in value)
    if isinstance(value, dict):
        return {k: _map(function, v) for k, v in value.items()}
    return function(value)


def _wide(columns: Tensor, width: int) -> Tensor:
    missing = width - columns.shape[1]
    return columns if missing <= 0 else torch.nn.functional.pad(columns, (0, missing))


def _form(value: Any) -> Form:
    if isinstance(value, Form):
        return value
    flat = torch.as_tensor(value, dtype=torch.float64)
    return Form(flat.reshape(-1, 1), tuple(flat.shape))


def _shape(value: Form | Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _expanded(value: Form | Tensor, shape: tuple[int, ...]) -> Form:
    form = _form(value)
    order = torch.arange(form.columns.shape[0]).reshape(form.shape).expand(shape).reshape(-1)
    return Form(form.columns[order], shape)
