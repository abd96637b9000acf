"""A rollout's cell and readout as functions of a flat parameter vector, batched over starts and lanes.

In: a `Rollout`. Out: `CellFunctions`, whose step, output and Jacobians take parameters (starts, p) and states
(starts, lanes, n), a lane being one time step of one trajectory. Invariant: the module is only read; Jacobians of all
lanes and starts come from one vmapped call (forward mode over the n + p directions, reverse mode where p is large).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from lagcompile.dynamics.forward_mode import derivative
from lagcompile.dynamics.integrators import Adaptive, OdeCell
from lagcompile.dynamics.kernels import Kernel
from lagcompile.dynamics.rollout import Rollout, Select
from lagcompile.ir.base import BindError

Row = Callable[..., Tensor]
Pullback = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From factors of a result to derivatives by states (starts, lanes, n) and parameters (starts, p); None: none."""
FORWARD_DIRECTIONS = 48
"""Forward mode is used up to this many directions n + p; beyond it n backward passes are cheaper."""


@dataclass(frozen=True)
class ParameterLayout:
    """Names, shapes and places of the trained parameters in the flat vector.

    Attributes:
        names: parameter names as in the rollout's state dict.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(torch.Size(s).numel() for s in self.shapes))

    @property
    def size(self) -> int:
        """Numbers in the flat vector."""
        return sum(self.sizes)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Named tensors from a flat vector (p,)."""
        parts = theta.split(self.sizes)
        return {n: p.view(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}

    def labels(self) -> tuple[str, ...]:
        """One label for each number: the name, with an index where the parameter has several numbers."""
        found: list[str] = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if not shape or torch.Size(shape).numel() == 1:
                found.append(name)
            else:
                places = torch.cartesian_prod(*[torch.arange(s) for s in shape]).reshape(-1, len(shape)).tolist()
                found.extend(f"{name}[{','.join(map(str, place))}]" for place in places)
        return tuple(found)


class CellFunctions:
    """Batched step, output and their Jacobians.

    Args:
        rollout: the module; parameters with requires_grad are the variables, others stay as they are.
        dtype: floating type of the computation.
        device: device of the computation.
        compile: fuse step and Jacobians by torch.compile: the first call of each shape takes seconds, later ones are
            several times as fast. Worth it for many starts, or for many fits with one `CellFunctions`. A string
            names another backend of torch.compile.

    Raises:
        BindError: the rollout has no trainable parameter.
    """

    def __init__(
        self,
        rollout: Rollout,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        *,
        compile: bool | str = False,
    ) -> None:
        self.rollout, self.dtype, self.device = rollout, dtype, torch.device(device)
        trained = {n: p for n, p in rollout.named_parameters() if p.requires_grad}
        if not trained:
            raise BindError("the rollout has no parameter with requires_grad=True: there is nothing to fit")
        self.layout = ParameterLayout(tuple(trained), tuple(tuple(p.shape) for p in trained.values()))
        rest = {n: p for n, p in rollout.named_parameters() if not p.requires_grad} | dict(rollout.named_buffers())
        self._fixed = {
            n: t.detach().to(device=self.device, dtype=dtype if t.is_floating_point() else t.dtype)
            for n, t in rest.items()
        }
        self._step_module, self._read_module, self._field_module = _Step(rollout), _Read(rollout), _Field(rollout)
        self.n, self.p = rollout.state_size, self.layout.size
        self._kernels: dict[tuple[str, bool, float | None], Kernel] = {}
        self._compile = bool(compile) and not isinstance(rollout.cell, Adaptive)
        self._backend = compile if isinstance(compile, str) else "inductor"

    @property
    def first_order_only(self) -> bool:
        """Whether second derivatives are unavailable because of an adaptive solver."""
        return isinstance(self.rollout.cell, Adaptive)

    def start(self) -> Tensor:
        """The module's present parameters as a flat vector (p,)."""
        named = dict(self.rollout.named_parameters())
        flat = [named[n].detach().reshape(-1) for n in self.layout.names]
        return torch.cat(flat).to(dtype=self.dtype, device=self.device)

    def _call(self, module: nn.Module, theta: Tensor, *args: Tensor | float | None) -> Tensor:
        values = {f"rollout.{n}": t for n, t in (self._fixed | self.layout.unflatten(theta)).items()}
        result: Tensor = functional_call(module, values, args)
        return result

    def _step1(self, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float) -> Tensor:
        return self._call(self._step_module, theta, x, u, h)

    def _read1(self, theta: Tensor, x: Tensor) -> Tensor:
        return self._call(self._read_module, theta, x)

    def step(self, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float) -> Tensor:
        """Next states (starts, lanes, n); theta is (starts, p), inputs (lanes, m), h a number or (lanes, 1)."""
        if self._compile:
            return self._kernel("step", u, h)(theta, x, *self._as_data(u, h)[0])[0]
        return self._step(theta, x, u, h)

    def _step(self, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float) -> Tensor:
        if theta.shape[0] == 1 or isinstance(self.rollout.cell, Adaptive):
            return torch.stack([self._step1(t, row, u, h) for t, row in zip(theta, x, strict=True)])
        return vmap(self._step1, in_dims=(0, 0, None, None))(theta, x, u, h)

    def taped_step(self, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float) -> tuple[Tensor, Pullback]:
        """`step`, and its reverse mode: what a first-order method needs, whatever the number of parameters."""
        if self._compile:
            kernel, data = self._kernel("pullback", u, h), self._as_data(u, h)[0]

            def pull_compiled(factors: Tensor) -> tuple[Tensor, Tensor | None]:
                by_state, by_theta = kernel(theta, torch.cat([x, factors], -1), *data)
                return by_state, by_theta

            return self.step(theta, x, u, h), pull_compiled
        return _taped(lambda t, s: self._step(t, s, u, h), theta, x)

    def taped_output(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        """`output` and its reverse mode."""
        readout = self.rollout.readout
        if isinstance(readout, nn.Identity):
            return x, lambda factors: (factors, None)
        if isinstance(readout, Select):
            index = torch.tensor(readout.components, device=x.device)
            return x[..., index], lambda factors: (torch.zeros_like(x).index_add_(-1, index, factors), None)
        return _taped(lambda t, s: vmap(self._read1)(t, s), theta, x)

    def output(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs (starts, lanes, outputs) of states (starts, lanes, n)."""
        if isinstance(self.rollout.readout, Select):
            return x[..., list(self.rollout.readout.components)]
        if isinstance(self.rollout.readout, nn.Identity):
            return x
        return vmap(self._read1)(theta, x)

    def step_jacobian(self, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float) -> tuple[Tensor, Tensor]:
        """Jacobians (starts, lanes, n, n) and (starts, lanes, n, p) of `step`."""
        if isinstance(self.rollout.cell, Adaptive):
            return self._variational(self.rollout.cell, theta, x, u, h)
        if self._compile:
            by_state, by_theta = self._kernel("jacobian", u, h)(theta, x, *self._as_data(u, h)[0])
            return by_state, by_theta
        return self._step_jacobian(theta, x, u, h)

    def state_jacobian(self, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float) -> Tensor:
        """Jacobian (starts, lanes, n, n) of `step` by the state alone: n backward passes where parameters are many."""
        if self.n + self.p <= FORWARD_DIRECTIONS or self.first_order_only:
            return self.step_jacobian(theta, x, u, h)[0]
        _, pull = _taped(lambda t, s: self._step(t, s, u, h), theta, x)
        eye = torch.eye(self.n, dtype=x.dtype, device=x.device)
        return torch.stack([pull(row.expand_as(x))[0] for row in eye], dim=-2)

    def _kernel(self, what: str, u: Tensor | None, h: Tensor | float) -> Kernel:
        """Compiled step, Jacobian or pullback for calls of one form: with inputs or not, one step length or more."""
        form = (what, u is not None, None if isinstance(h, Tensor) else h)
        if form not in self._kernels:
            has_inputs, number = form[1], form[2]

            def run(theta: Tensor, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
                now = data[0] if has_inputs else None
                length = data[-1] if number is None else number
                if what == "step":
                    return (self._step(theta, x, now, length),)
                if what == "pullback":
                    state, factors = x[..., : self.n].contiguous(), x[..., self.n :].contiguous()
                    pull = torch.func.vjp(lambda t, s: self._step(t, s, now, length), theta, state)[1]
                    by_theta, by_state = pull(factors)
                    return by_state, by_theta
                return self._step_jacobian(theta, x, now, length)

            self._kernels[form] = Kernel(run, self._backend)
        return self._kernels[form]

    def _step_jacobian(self, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float) -> tuple[Tensor, Tensor]:
        data, rows = self._as_data(u, h)
        return self._jacobian(rows, lambda t, s, i: self._lane(t, s, u, h, i), theta, x, data)

    def output_jacobian(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Jacobians (starts, lanes, outputs, n) and (starts, lanes, outputs, p) of `output`, or None for it."""
        readout = self.rollout.readout
        if isinstance(readout, (Select, nn.Identity)):
            eye = torch.eye(self.n, dtype=x.dtype, device=x.device)
            rows = eye if isinstance(readout, nn.Identity) else eye[list(readout.components)]
            return rows.expand(*x.shape[:2], *rows.shape), None
        return self._jacobian(self._read1, lambda t, s, i: self._read1(t, s[None])[0], theta, x)

    def curvature(
        self, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float, *, adjoint: Tensor, error: Tensor
    ) -> Tensor:
        """Second derivatives (starts, lanes, n + p, n + p) of <adjoint, step> + <error, output>, forward over forward.

        Args:
            theta: (starts, p) parameters.
            x: (starts, lanes, n) states.
            u: (lanes, m) inputs or None.
            h: step lengths, a number or (lanes, 1).
            adjoint: (starts, lanes, n) factors of the next states.
            error: (starts, lanes, outputs) factors of the outputs.
        """
        n = self.n
        eye = torch.eye(n + self.p, dtype=x.dtype, device=x.device)
        lanes = x.shape[1]

        def one_start(t: Tensor, s: Tensor, a: Tensor, e: Tensor) -> Tensor:
            def value(t: Tensor, s: Tensor) -> Tensor:
                return (a * self._step1(t, s, u, h)).sum(-1) + (e * self._read1(t, s)).sum(-1)

            def slope(t: Tensor, s: Tensor, d: Tensor) -> Tensor:
                return derivative(value, (t, s), (d[n:], d[:n].expand(lanes, n)))

            def second(d: Tensor, c: Tensor) -> Tensor:
                moved = (c[n:], c[:n].expand(lanes, n))
                return derivative(lambda t, s: slope(t, s, d), (t, s), moved)

            return vmap(vmap(second, in_dims=(None, 0)), in_dims=(0, None))(eye, eye)

        found = vmap(one_start)(theta.contiguous(), x.contiguous(), adjoint, error)
        return found.movedim(3, 1)

    def _lane(self, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float, lane: Tensor) -> Tensor:
        row = lane[None]
        length = h[row] if isinstance(h, Tensor) else h
        return self._step1(theta, x[None], None if u is None else u[row], length)[0]

    def _as_data(self, u: Tensor | None, h: Tensor | float) -> tuple[tuple[Tensor, ...], Row]:
        """Tensors that a step reads but is not differentiated by, and the step as a function that takes them last."""
        data = tuple(d for d in (u, h) if isinstance(d, Tensor))

        def rows(t: Tensor, s: Tensor, *given: Tensor) -> Tensor:
            now = given[0] if u is not None else None
            return self._step1(t, s, now, given[-1] if isinstance(h, Tensor) else h)

        return data, rows

    def _jacobian(
        self, batch: Row, lane: Row, theta: Tensor, x: Tensor, data: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Jacobians of a row-wise function, given for rows (`batch`) and for one row and its index (`lane`)."""
        if self.n + self.p <= FORWARD_DIRECTIONS:
            return self._forward_jacobian(batch, theta, x, data)
        index = torch.arange(x.shape[1], device=x.device)
        reverse = jacrev(lane, argnums=(1, 0))
        if theta.shape[0] == 1:
            a, b = vmap(reverse, in_dims=(None, 0, 0))(theta[0], x[0], index)
            return a[None], b[None]
        return vmap(vmap(reverse, in_dims=(None, 0, 0)), in_dims=(0, 0, None))(theta, x, index)

    def _forward_jacobian(
        self, batch: Row, theta: Tensor, x: Tensor, data: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        n, p = self.n, self.p
        eye = torch.eye(n + p, dtype=x.dtype, device=x.device)
        lanes = x.shape[1]
        theta, x = theta.contiguous(), x.contiguous()  # dual tensors cannot be expanded views
        data = tuple(d.contiguous() for d in data)
        # Data get a tangent of stored zeros: torch works out absent ones in Python, which costs more than the product.
        still = tuple(torch.zeros_like(d) for d in data)

        def columns(t: Tensor, s: Tensor) -> Tensor:
            def one(direction: Tensor) -> Tensor:
                tangents = (direction[n:], direction[:n].expand(lanes, n), *still)
                return derivative(batch, (t, s, *data), tangents)

            return vmap(one)(eye)

        found = columns(theta[0], x[0])[None] if theta.shape[0] == 1 else vmap(columns)(theta, x)
        full = found.movedim(1, -1)
        return full[..., :n], full[..., n:]

    def _variational(
        self, cell: Adaptive, theta: Tensor, x: Tensor, u: Tensor | None, h: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Jacobians from the variational equations, integrated together with the state.

        torchdiffeq's solver cannot be differentiated in forward mode, and its reverse mode does not separate lanes.
        """
        n, width = self.n, self.n + self.p
        eye = torch.eye(width, dtype=x.dtype, device=x.device)
        length = cell.dt if cell.dt is not None else h
        found = []
        for t, s in zip(theta, x, strict=True):

            def slope(time: Tensor, joint: Tensor, t: Tensor = t) -> Tensor:
                point, tangents = joint[:, :n], joint[:, n:].unflatten(1, (width, n))
                now = cell.input_at(u, time)

                def field(a: Tensor, b: Tensor) -> Tensor:
                    return self._call(self._field_module, a, b, now)

                def along(change: Tensor, direction: Tensor) -> Tensor:
                    return derivative(field, (t, point.contiguous()), (direction, change.contiguous()))

                moved = vmap(along, in_dims=(1, 0), out_dims=1)(tangents, eye[:, n:])
                return length * torch.cat([field(t, point), moved.flatten(1)], dim=1)

            start = torch.cat([s, eye[:, :n].reshape(1, -1).expand(len(s), -1)], dim=1)
            end = cell.integrate(slope, start)[:, n:]
            found.append(end.unflatten(1, (width, n)).mT)
        full = torch.stack(found)
        return full[..., :n], full[..., n:]


def _taped(function: Row, theta: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
    """Value and pullback of a row-wise function; the pullback may be called more than once."""
    with torch.enable_grad():
        t, s = theta.detach().requires_grad_(True), x.detach().requires_grad_(True)
        value = function(t, s)

    def pull(factors: Tensor) -> tuple[Tensor, Tensor | None]:
        by_state, by_theta = torch.autograd.grad(value, (s, t), factors, materialize_grads=True, retain_graph=True)
        return by_state, by_theta

    return value.detach(), pull


class _Field(nn.Module):
    def __init__(self, rollout: Rollout) -> None:
        super().__init__()
        self.rollout = rollout

    def forward(self, x: Tensor, u: Tensor | None) -> Tensor:
        cell = self.rollout.cell
        if not isinstance(cell, OdeCell):
            raise BindError(f"cell {type(cell).__name__} has no vector field")
        result: Tensor = cell.field(x) if u is None else cell.field(x, u)
        return result


class _Step(nn.Module):
    def __init__(self, rollout: Rollout) -> None:
        super().__init__()
        self.rollout = rollout

    def forward(self, x: Tensor, u: Tensor | None, h: Tensor | float) -> Tensor:
        return self.rollout.step(x, u, h)


class _Read(nn.Module):
    def __init__(self, rollout: Rollout) -> None:
        super().__init__()
        self.rollout = rollout

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.rollout.readout(x)
        return result
