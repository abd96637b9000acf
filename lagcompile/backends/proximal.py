"""ProxProp: implicit weight steps, layer by layer (Frerix, Moellenhoff, Moeller and Cremers, ICLR 2018).

In: an `Instance` with transient states, each stage with at most one layer that is affine in its weights. Out: an
executor. Invariant: with every layer explicit and plain SGD, a step is backprop's SGD step with rate tau * lr.

One batch, with h from a forward pass: a sweep of gradient steps on the penalty energy sets targets h_k - d_k from the
last state to the first (their step sizes cancel the energy's weights), and each layer phi(theta, a) moves to
    argmin_theta 1/2 |phi(theta, a) - (z - d)|^2 + 1/(2 tau) |theta - theta_old|^2,
so that theta_old - theta = (A^T A + I/tau)^-1 A^T d with A = [a, 1] (patches of a, for a convolution). That direction
goes to the step rule. Because the loss is a mean while A^T A is a sum over rows, tau depends on the batch size.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lagcompile.backends.local import (
    StageExecutor,
    StageMethod,
    StageNetwork,
    bare_weights,
    calls,
    gradients_of,
    weight_penalty,
    weighted_layers,
)
from lagcompile.frontend.stages import StageModule
from lagcompile.frontend.tensors import dense
from lagcompile.ir.base import Frozen, ProgramError
from lagcompile.ir.symbols import Symbols
from lagcompile.ir.tex import display, number
from lagcompile.runtime.instance import Instance
from lagcompile.runtime.rules import SGD, RuleSpec, rules_tex


class Exact(Frozen):
    """Solve the layer's normal equations by a Cholesky factorisation, in the smaller of the two dimensions."""

    words: ClassVar[str] = "exactly"
    kind: Literal["exact"] = "exact"
    woodbury: bool | None = None
    """Factor the rows' matrix (A A^T + I/tau), not the weights'; None: where there are fewer rows than weights."""


class ConjugateGradients(Frozen):
    """A fixed number of conjugate-gradient steps from the current weights, each output unit on its own."""

    kind: Literal["cg"] = "cg"
    iterations: int = Field(default=3, ge=1)
    """Conjugate-gradient steps for each layer."""

    @property
    def words(self) -> str:
        """How the step is computed."""
        return f"by {self.iterations} conjugate-gradient steps"


Solve = Annotated[Exact | ConjugateGradients, Field(discriminator="kind")]


class ProxProp(StageMethod):
    """Proximal backpropagation: implicit steps on the weights of affine layers, explicit ones on everything else."""

    kind: Literal["proxprop"] = "proxprop"
    weights: RuleSpec = SGD(lr=1.0, momentum=0.95, nesterov=True)
    """Step rule that takes the direction theta_old - theta in the place of a gradient."""
    tau: float = Field(default=0.05, gt=0)
    """Proximal step size; an explicit layer's direction is tau times its gradient."""
    implicit: Solve = ConjugateGradients()
    """How the implicit step is computed."""
    explicit: tuple[str, ...] = ()
    """Globs of layer paths that take explicit steps; the last stage's always do."""

    def executor(self, instance: Instance, *, seed: int = 0) -> ProxPropExecutor:
        """Return an executor of this method on an instance; see `Solver.executor`."""
        return ProxPropExecutor(instance, self, seed=seed)

    def tex(self, symbols: Symbols) -> list[str]:
        """Return the targets and the proximal step on each layer."""
        return [
            r"With $h$ from a forward pass and $z_k$ the output of the affine layer $\phi_k$ in stage $k$, a backward "
            r"sweep of gradient steps gives targets $z_k - \delta_k$; each layer moves along "
            r"$\theta_k - \theta_k^{+}$ with",
            *display(
                r"\theta_k^{+} = \operatorname*{arg\,min}_{\theta} \; \tfrac12 \sum_i \bigl\lVert "
                r"\phi_k(\theta, a_k^{(i)}) - z_k^{(i)} + \delta_k^{(i)} \bigr\rVert^2 + \tfrac{1}{2 \tau} "
                r"\lVert \theta - \theta_k \rVert^2"
            ),
            rf"and $\tau = {number(self.tau)}$, solved {self.implicit.words}; the last stage takes its gradient. "
            + rules_tex({r"\theta": self.weights}),
        ]


@dataclass(frozen=True)
class Affine:
    """A layer that is affine in its weights, and the positions of its weights among the leaves."""

    path: str
    module: nn.Linear | nn.Conv2d
    weight: int
    bias: int | None


class ProxPropExecutor(StageExecutor):
    """Runs ProxProp."""

    method: ProxProp

    def __init__(self, instance: Instance, method: ProxProp, *, seed: int = 0) -> None:
        super().__init__(instance, method, method.weights, seed=seed)
        self.method = method
        self.network = StageNetwork(self.instance)
        self._affine = self._layers()

    def _layers(self) -> dict[str, Affine]:
        """The implicit layer of each stage that has one."""
        index = {id_of(p): i for i, p in enumerate(self.leaves)}
        found: dict[str, Affine] = {}
        problems: list[str] = []
        users: dict[int, list[str]] = {}
        paths: list[str] = []
        for stage in self.network.stages:
            paths += [p for p, _ in weighted_layers(stage)]
            for q in stage.module.parameters():
                users.setdefault(id_of(q), []).append(stage.name)
            if stage in self.network.last:
                continue
            layers = [(p, m) for p, m in weighted_layers(stage) if any(q.requires_grad for q in m.parameters())]
            implicit = [(p, m) for p, m in layers if not self._explicit(p)]
            problems += _layer_problems(stage, layers, implicit)
            for path, module in implicit:
                if isinstance(module, nn.Linear | nn.Conv2d):
                    bias = None if module.bias is None else index.get(id_of(module.bias))
                    weight = index.get(id_of(module.weight))
                    if weight is None or (module.bias is not None and bias is None):
                        problems.append(f"proxprop: weight and bias of {path} must both be solved for, or both frozen")
                        continue
                    found[stage.name] = Affine(path, module, weight, bias)
        for layer in {a.path: a for a in found.values()}.values():
            for name, q in layer.module.named_parameters():
                if len(users[id_of(q)]) > 1:
                    problems.append(
                        f"proxprop: {layer.path}.{name} is shared by the stages {', '.join(users[id_of(q)])}, so the "
                        f"implicit step of {layer.path} is not defined: name it under 'explicit', or use method "
                        "backprop, altmin or extragradient"
                    )
        problems += [
            f"proxprop: explicit: no layer is called '{pattern}' (layers with weights: {', '.join(paths)})"
            for pattern in self.method.explicit
            if not fnmatch.filter(paths, pattern)
        ]
        if problems:
            raise ProgramError(problems)
        return found

    def _explicit(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.method.explicit)

    # ---------------------------------------------------------------- one step
    def step(self, rows: Tensor) -> None:
        """One forward pass, one backward sweep of local steps, one step of the rule."""
        batch = self.instance.batch(rows)
        values, tape = self._record(batch.values)
        with torch.enable_grad():
            loss = self.instance.loss(self.instance.output(values), batch.target)
        directions = self._sweep(loss, tape)
        with torch.enable_grad():
            penalty = weight_penalty(self.instance, self.leaves)
        if penalty is not None:
            self._store(directions, gradients_of(penalty, self.leaves))
        self.apply(directions)
        self.hold([values[c.state.node] for c in self.network.codes])
        self.look(loss=loss, defect=self._defect)
        self.gradient_evaluations += 1
        self.steps += 1

    def _record(self, data: dict[str, Any]) -> tuple[dict[str, Any], list[_Record]]:
        """Run every stage on states that are leaves, keeping what its local sweep needs."""
        nodes = {c.state.node for c in self.network.codes}
        values: dict[str, Any] = dict(data)
        tape: list[_Record] = []
        for stage in self.network.stages:
            record = _Record(stage, {n: values[n] for n in stage.reads if n in nodes})
            layer = self._affine.get(stage.name)
            handle = None if layer is None else layer.module.register_forward_hook(record.keep)
            with torch.enable_grad():
                record.written = self.network.run(stage, values)
            if handle is not None:
                handle.remove()
            for n, v in record.written.items():
                values[n] = v.detach().requires_grad_() if n in nodes else v
            tape.append(record)
        return values, tape

    def _sweep(self, loss: Tensor, tape: list[_Record]) -> list[Tensor | None]:
        """Targets h_k - d_k from the last state to the first, and the direction of every weight."""
        codes = {c.state.node: c for c in self.network.codes}
        leaves: dict[str, Tensor] = {}
        for record in tape:
            leaves.update(record.states)
        directions: list[Tensor | None] = [None for _ in self.leaves]
        names = list(leaves)
        # a stage may write a state and an output of one graph
        last = gradients_of(loss, [*leaves.values(), *self.leaves], keep=True)
        steps = {n: g for n, g in zip(names, last, strict=False) if g is not None}
        self._store(directions, last[len(names) :])
        size, count = loss.new_zeros(()), 0
        for record in reversed(tape):
            own = {n: v for n, v in record.written.items() if n in codes and n in steps and v.requires_grad}
            if not own:
                continue
            cotangents = [steps[n] for n in own]  # prediction minus target, as the prediction is the state itself
            size, count = size + sum(c.abs().sum() for c in cotangents), count + sum(c.numel() for c in cotangents)
            layer = self._affine.get(record.stage.name)
            inner = [] if layer is None else [record.output]
            found = torch.autograd.grad(
                list(own.values()), [*record.states.values(), *inner, *self.leaves], cotangents, allow_unused=True
            )
            for n, g in zip(record.states, found, strict=False):
                if g is not None:
                    steps[n] = steps[n] + g if n in steps else g
            rest = dense(found[len(record.states) + len(inner) :])
            if layer is not None:
                rest[layer.weight] = None
                if layer.bias is not None:
                    rest[layer.bias] = None
            self._store(directions, rest)
            if layer is not None and found[len(record.states)] is not None:
                self._implicit(directions, layer, record.input, found[len(record.states)])
        self._defect = size / max(count, 1)
        return directions

    def _store(self, directions: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
        for i, g in enumerate(gradients):
            if g is not None:
                step = self.method.tau * g
                old = directions[i]
                directions[i] = step if old is None else old + step

    def _implicit(self, directions: list[Tensor | None], layer: Affine, a: Tensor, d: Tensor) -> None:
        with torch.no_grad():
            matrix, right = design(layer.module, a, d)
            weight = layer.module.weight
            if weight.dtype in {torch.bfloat16, torch.float16}:  # no factorisations, and too few digits for CG
                matrix, right = matrix.float(), right.float()
            solution = solve(matrix, right, self.method.tau, self.method.implicit).to(weight.dtype)
            width = weight[0].numel()
            directions[layer.weight] = solution[:width].T.reshape(weight.shape)
            if layer.bias is not None:
                directions[layer.bias] = solution[width]


class _Record:
    """One stage's run: the states that it read, what it wrote, input and output of its implicit layer."""

    def __init__(self, stage: StageModule, states: dict[str, Tensor]) -> None:
        self.stage, self.states = stage, states
        self.written: dict[str, Any] = {}
        self.input = self.output = torch.empty(0)

    def keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook of the implicit layer."""
        self.input, self.output = inputs[0].detach(), output


def id_of(tensor: Tensor) -> int:
    """Address of a tensor's memory: equal for a parameter and the same parameter under another name."""
    return tensor.data_ptr()


def _layer_problems(
    stage: StageModule, layers: Sequence[tuple[str, nn.Module]], implicit: Sequence[tuple[str, nn.Module]]
) -> list[str]:
    problems = []
    if len(implicit) > 1:
        paths = ", ".join(p for p, _ in implicit)
        problems.append(
            f"proxprop: stage {stage.name} holds the layers {paths} and is not affine in the weights of "
            f"{implicit[0][0]}: cut after each of them, or name all but one under 'explicit'"
        )
    for path, module in implicit:
        if not _is_affine(module):
            problems.append(
                f"proxprop: the layer {path} ({type(module).__name__}) has no implicit step, which needs a real "
                "nn.Linear or an ungrouped nn.Conv2d that pads with zeros: name it under 'explicit', or use method "
                "backprop or altmin"
            )
        elif calls(stage)[path] > 1:
            problems.append(
                f"proxprop: stage {stage.name} calls the layer {path} {calls(stage)[path]} times, so its implicit step "
                "is not defined: name it under 'explicit', or use method backprop, altmin or extragradient"
            )
    problems += [
        f"proxprop: stage {stage.name} uses the parameter {name} outside any layer, so its implicit step is not "
        "defined: use method backprop, altmin or extragradient"
        for name in bare_weights(stage)
    ]
    return problems


def _is_affine(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros"):
        return False
    return isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_complex()


def design(module: nn.Linear | nn.Conv2d, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Rows A = [a, 1] and right-hand side d of a layer: (rows, inputs [+ 1]) and (rows, outputs).

    Args:
        module: the layer; for a convolution, rows are (example, position) and columns are patch entries.
        a: its input.
        d: step of its output, of the output's shape.
    """
    if isinstance(module, nn.Conv2d):
        padded = F.pad(a, _zeros_around(module))
        patches = F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
        rows, right = patches.transpose(1, 2).flatten(0, 1), d.flatten(2).transpose(1, 2).flatten(0, 1)
    else:
        rows, right = a.reshape(-1, a.shape[-1]), d.reshape(-1, d.shape[-1])
    if module.bias is not None:
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
    return rows, right


def _zeros_around(module: nn.Conv2d) -> list[int]:
    """Zeros left, right, above and below an image; "same" puts the odd one right and below, as PyTorch does."""
    if module.padding == "valid":
        return [0, 0, 0, 0]
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [n for t in reversed(total) for n in (t // 2, t - t // 2)]
    assert not isinstance(module.padding, str)  # PyTorch has no other word
    return [n for n in reversed(module.padding) for _ in range(2)]


def solve(matrix: Tensor, right: Tensor, tau: float, how: Exact | ConjugateGradients) -> Tensor:
    """(A^T A + I/tau)^-1 A^T d.

    Args:
        matrix: A, (rows, inputs).
        right: d, (rows, outputs).
        tau: proximal step size.
        how: exact (weights' or rows' matrix) or by conjugate gradients.
    """
    if isinstance(how, ConjugateGradients):
        return _conjugate_gradients(matrix, matrix.T @ right, 1.0 / tau, how.iterations)
    rows, inputs = matrix.shape
    # 1 + tau |A|^2 bounds the condition number: beyond the precision at hand a factorisation may end in nonsense
    if matrix.dtype != torch.float64 and float(matrix.square().sum()) * tau * torch.finfo(matrix.dtype).eps > 0.1:
        return solve(matrix.double(), right.double(), tau, how).to(right.dtype)
    if how.woodbury if how.woodbury is not None else rows < inputs:
        return matrix.T @ _cholesky(matrix, right, tau)
    return _cholesky(matrix.T, matrix.T @ right, tau)


def _cholesky(factor: Tensor, right: Tensor, tau: float) -> Tensor:
    """(F F^T + I/tau)^-1 right; not a number where that does not exist, so that a run ends as diverged."""
    matrix = factor @ factor.T
    matrix.diagonal().add_(1.0 / tau)
    root, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where(failed == 0, torch.cholesky_solve(right, root), torch.nan)


def _conjugate_gradients(matrix: Tensor, right: Tensor, beta: float, iterations: int) -> Tensor:
    """Conjugate gradients on (A^T A + beta I) X = right, from X = 0, every column with its own step lengths."""
    normal = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else None
    x, residual = torch.zeros_like(right), right.clone()
    direction, size = residual.clone(), (residual * residual).sum(0)
    tiny = torch.finfo(right.dtype).tiny
    for _ in range(iterations):
        image = (normal @ direction if normal is not None else matrix.T @ (matrix @ direction)) + beta * direction
        length = size / (direction * image).sum(0).clamp_min(tiny)
        x = x + length * direction
        residual = residual - length * image
        fresh = (residual * residual).sum(0)
        direction = residual + (fresh / size.clamp_min(tiny)) * direction
        size = fresh
    return x
