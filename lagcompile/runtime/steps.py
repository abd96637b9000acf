"""Step rules that can extrapolate, as torch optimisers: dense tensors, and rows of tables.

In: gradients. Out: moved values. Invariant: a rule serves extrapolation and update alike; both half steps of
extragradient advance its slots (Gidel et al. 2019).

`Extra` and `ExtraRows` are `torch.optim.Optimizer`s: schedulers, `state_dict`, pickling and `param_groups` work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lagcompile.ir.base import BindError
from lagcompile.runtime.rules import Rule, Scheme, Slots, Tensors


def _count_shape(tensor: Tensor, rows: bool) -> tuple[int, ...]:
    """A count needs one number for a dense tensor, one for each row of a table."""
    return (1, tensor.shape[1], *(1 for _ in tensor.shape[2:])) if rows else ()


def _slot(rule: Rule, name: str, tensor: Tensor, *, rows: bool) -> Tensor:
    if name in rule.counts():
        return torch.zeros(_count_shape(tensor, rows), dtype=torch.float32, device=tensor.device)
    # accumulators of half-precision tables are kept in float32: sums of small squares would stop growing otherwise
    dtype = torch.float32 if tensor.dtype in {torch.bfloat16, torch.float16} else tensor.dtype
    # filled, not zero-allocated: memory that is only promised would be fetched page by page inside the steps
    return torch.empty_like(tensor, dtype=dtype).fill_(0.0 if name == "past" else rule.initial(name))


def _slot_names(rule: Rule, scheme: Scheme) -> tuple[str, ...]:
    past = ("past",) if scheme in {"past", "optimistic"} else ()
    return (*rule.slots(), *rule.counts(), *past)


class _Keeping(torch.optim.Optimizer):
    """A torch optimiser whose slots keep their own type when loaded (PyTorch casts them to the parameter's)."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Learning rates, slots and, between half steps, remembered values."""
        super().load_state_dict(state_dict | {"state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        for index, slots in state_dict["state"].items():
            self.state[params[index]] = {n: t.detach().clone().to(params[index].device) for n, t in slots.items()}


class Extra(_Keeping):
    """A step rule on dense tensors, with an extrapolation.

    Extragradient in your own loop: compute gradients, `extrapolate()`, compute gradients again, `step()`. Without
    a call of `extrapolate` it is the plain rule.

    Args:
        params: tensors to move, or parameter groups.
        rule: the step rule; its `lr` is the group's default.
        scheme: how gradients are combined; see `Scheme`.
    """

    def __init__(self, params: Any, rule: Rule, scheme: Scheme = "extragradient") -> None:
        self.rule = rule
        self.scheme: Scheme = scheme
        self._spare: dict[Tensor, Tensor] = {}
        super().__init__(params, {"lr": rule.lr})
        for group in self.param_groups:
            for p in group["params"]:
                for name in _slot_names(rule, scheme):
                    self.state[p][name] = _slot(rule, name, p, rows=False)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {"rule": self.rule, "scheme": self.scheme, "_spare": {}}

    @torch.no_grad()
    def extrapolate(self) -> None:
        """Take the first half step: remember the values, and move them along the gradients (or the last ones)."""
        if self.scheme in {"descent", "optimistic"}:
            return
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None or self.scheme == "past"]
            for p in params:
                # extrapolated values have separate memory: one copy there, and none back
                ahead = self._spare.pop(p, None)
                ahead = torch.empty_like(p) if ahead is None or ahead.shape != p.shape else ahead
                self.state[p]["saved"] = p.data
                p.data = ahead.copy_(p.data)
            past = self.scheme == "past"
            gradients = [self.state[p]["past"] if past else p.grad for p in params]
            self._move(params, gradients, group["lr"], advance=not past)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """The second half step: from the remembered values, along the gradients at the extrapolated ones."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                saved = self.state[p].pop("saved", None)
                if saved is not None:  # also those that have no gradient now
                    self._spare[p], p.data = p.data, saved
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in params]
            self._move(params, self._combined(params, gradients), group["lr"], advance=True)
        return loss

    def _combined(self, params: Sequence[Tensor], gradients: Tensors) -> Tensors:
        if self.scheme not in {"past", "optimistic"} or not params:  # all weights may be frozen
            return gradients
        past = [self.state[p]["past"] for p in params]
        ahead = _optimistic(gradients, past) if self.scheme == "optimistic" else gradients
        torch._foreach_copy_(past, gradients)
        return ahead

    def _move(self, params: Sequence[Tensor], gradients: Tensors, lr: float, *, advance: bool) -> None:
        if not params:
            return
        slots = {n: [self.state[p][n] for p in params] for n in (*self.rule.slots(), *self.rule.counts())}
        if any(p.is_complex() for p in params):  # real and imaginary parts have separate slots, as in PyTorch
            params, gradients = _parts(params), _parts(gradients)
            slots = {n: _parts(t) for n, t in slots.items()}
        if not advance:  # the last gradient has been counted already
            slots = {n: [t.clone() for t in tensors] for n, tensors in slots.items()}
        turned = [not p.is_contiguous() and p.dim() >= 2 and p.mT.is_contiguous() for p in params]
        values, gradients = _rows_first(params, turned), _rows_first(gradients, turned)
        slots = {n: _rows_first(t, turned) for n, t in slots.items()}
        kept = [next((slots[n][i].dtype for n in self.rule.slots()), v.dtype) for i, v in enumerate(values)]
        if all(v.dtype == t for v, t in zip(values, kept, strict=True)):
            self.rule.move(values, gradients, slots, lr)
            return
        wide = [v.to(t) for v, t in zip(values, kept, strict=True)]  # half-precision weights, slots in float32
        self.rule.move(wide, [g.to(t) for g, t in zip(gradients, kept, strict=True)], slots, lr)
        for value, moved in zip(values, wide, strict=True):
            value.copy_(moved)


def _parts(tensors: Sequence[Tensor]) -> Tensors:
    """Return real views of complex tensors, and the other tensors as they are."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _rows_first(tensors: Sequence[Tensor], turned: Sequence[bool]) -> Tensors:
    """Return views in the order of memory, of which fused kernels need no copies."""
    return [t.mT if turn and t.dim() >= 2 else t for t, turn in zip(tensors, turned, strict=True)]


def _optimistic(gradients: Tensors, past: Tensors) -> Tensors:
    ahead = torch._foreach_mul(gradients, 2.0)
    torch._foreach_sub_(ahead, past)
    return list(ahead)


class ExtraRows(_Keeping):
    """A step rule on rows of tables of shape (banks, rows, ...): only the rows of the batch are read or written.

    One step: `take(rows)` gathers the rows, `extrapolated(gradients)` gives the rows of the first half step without
    touching the table, `update(gradients)` writes the second one back.

    Args:
        params: the tables.
        rule: the step rule; slots are tables too.
        scheme: how gradients are combined; see `Scheme`.
        ascent: climb along the gradients instead of descending.
    """

    def __init__(self, params: Any, rule: Rule, scheme: Scheme = "extragradient", *, ascent: bool = False) -> None:
        self.rule = rule
        self.scheme: Scheme = scheme
        self.ascent = ascent
        self._rows: list[Tensor | None] = []
        self._values: Tensors = []
        self._slots: Slots = {}
        self._gradients: Tensors = []
        self._project: Callable[[int, Tensor], Tensor] | None = None
        super().__init__(params, {"lr": rule.lr})
        for group in self.param_groups:
            for p in group["params"]:
                for name in _slot_names(rule, scheme):
                    self.state[p][name] = _slot(rule, name, p, rows=True)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        passing: dict[str, Any] = {"_rows": [], "_values": [], "_slots": {}, "_gradients": [], "_project": None}
        return state | {"rule": self.rule, "scheme": self.scheme, "ascent": self.ascent} | passing

    @property
    def tables(self) -> Tensors:
        """Tables, in order."""
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def take(self, rows: Sequence[Tensor | None], dtypes: Sequence[torch.dtype] | None = None) -> Tensors:
        """Gather rows of the tables as fresh tensors, in the types to compute in.

        Args:
            rows: for each table, indices into axis 1; None takes all rows.
            dtypes: for each table, the type to compute in; None keeps each table's own.
        """
        tables = self.tables
        self._rows = list(rows)
        types = dtypes if dtypes is not None else [t.dtype for t in tables]
        self._values = [_gather(t, r, d) for t, r, d in zip(tables, rows, types, strict=True)]
        taken = list(zip(tables, rows, self._values, strict=True))  # slots, too, in the type to compute in
        self._slots = {
            n: [_gather(self.state[t][n], r, None if n in self.rule.counts() else v.dtype) for t, r, v in taken]
            for n in self._names()
        }
        return self._values

    @property
    def held(self) -> Tensors:
        """Return the rows that were taken, as they are now."""
        return self._values

    @torch.no_grad()
    def extrapolated(self, gradients: Tensors | None) -> Tensors:
        """Return rows after the first half step; without gradients (scheme `past`) along the last ones."""
        if self.scheme in {"descent", "optimistic"}:
            return self._values
        values = [v.clone() for v in self._values]
        if self.scheme == "past":
            slots = {n: [t.clone() for t in ts] for n, ts in self._slots.items()}
            self._move(values, self._slots["past"], slots)
        else:
            assert gradients is not None
            self._move(values, gradients, self._slots)
        return values

    def update(self, gradients: Tensors, project: Callable[[int, Tensor], Tensor] | None = None) -> Tensors:
        """Take the second half step, and write it back to the tables.

        Args:
            gradients: one for each table, of the shape of the rows taken.
            project: keeps a table's rows inside their domain.
        """
        self._gradients, self._project = gradients, project
        self.step()
        return self._values

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Called by `update`, so that schedulers and hooks see a step.

        Raises:
            BindError: called by anything else: the gradients of a table belong to rows.
        """
        if not self._gradients:
            raise BindError("a table moves by rows: call take, extrapolated and update")
        gradients, self._gradients = self._gradients, []
        ahead = gradients
        if self.scheme in {"past", "optimistic"}:
            past = self._slots["past"]
            ahead = _optimistic(gradients, past) if self.scheme == "optimistic" else gradients
            torch._foreach_copy_(past, gradients)
        self._move(self._values, ahead, self._slots)
        if self._project is not None:
            self._values = [self._project(i, v) for i, v in enumerate(self._values)]
        for i, table in enumerate(self.tables):
            _scatter(table, self._rows[i], self._values[i])
            for name in self._names():
                _scatter(self.state[table][name], self._rows[i], self._slots[name][i])
        return None

    def _names(self) -> tuple[str, ...]:
        return _slot_names(self.rule, self.scheme)

    def _move(self, values: Tensors, gradients: Tensors, slots: Slots) -> None:
        index = 0
        for group in self.param_groups:
            span = slice(index, index + len(group["params"]))
            index = span.stop
            if span.stop > span.start:
                part = {n: slots[n][span] for n in (*self.rule.slots(), *self.rule.counts())}
                lr = -group["lr"] if self.ascent else group["lr"]  # every rule is odd in its gradients
                self.rule.move(values[span], gradients[span], part, lr)


def _gather(table: Tensor, rows: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    taken = table.detach().clone() if rows is None else table.detach().index_select(1, rows)
    return taken if dtype is None else taken.to(dtype)


def _scatter(table: Tensor, rows: Tensor | None, values: Tensor) -> None:
    values = values.to(table.dtype)
    if rows is None:
        table.copy_(values)
    else:
        table.index_copy_(1, rows, values)
