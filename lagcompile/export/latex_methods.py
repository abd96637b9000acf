"""What a method does in a step, in LaTeX.

In: `Symbols`, a method's options as plain data (this room knows no backend). Out: lines of LaTeX. Invariant: a method
without formulas here is refused, not passed over; a test asks for every method that a spec can name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lagcompile.export.symbols import Symbols
from lagcompile.ir.base import Frozen, ProgramError
from lagcompile.ir.tex import number

Options = Mapping[str, Any]


def method_lines(symbols: Symbols, method: Frozen) -> list[str]:
    """The paragraph on a method.

    Args:
        symbols: of the program.
        method: its options, with a `kind`.

    Raises:
        ProgramError: no formulas are known for it.
    """
    options = method.model_dump()
    kind = str(options.get("kind", type(method).__name__))
    if kind not in _METHODS:
        raise ProgramError(f"no LaTeX is known for the method '{kind}' (it is for {', '.join(_METHODS)})")
    return [rf"\paragraph{{Method: {kind.replace('_', ' ')}.}}", *_METHODS[kind](symbols, options)]


def _display(*lines: str) -> list[str]:
    body = [line + (r" \\" if i + 1 < len(lines) else "") for i, line in enumerate(lines)]
    return [r"\begin{align*}", *body, r"\end{align*}"]


def _rule(options: Options) -> str:
    """A step rule in words."""
    kind, rate = options["kind"], rf"step ${number(options['lr'])}$"
    if options.get("weight_decay"):
        rate += rf", weight decay ${number(options['weight_decay'])}$"
    if kind == "adam":
        first, second = options["betas"]
        return rf"Adam ({rate}, $\beta = ({number(first)}, {number(second)})$)"
    if kind == "adagrad":
        return f"Adagrad ({rate})"
    momentum = options.get("momentum") or 0.0
    name = "Nesterov's gradient" if options.get("nesterov") and momentum else "gradient"
    return f"{name} ({rate}{f', momentum ${number(momentum)}$' if momentum else ''})"


def _rules(options: Options, names: Mapping[str, str]) -> str:
    said = [f"{_rule(options[key])} for ${symbol}$" for key, symbol in names.items() if options.get(key)]
    return "Step rules: " + "; ".join(said) + "."


def _projection(symbols: Symbols) -> tuple[str, str]:
    """Symbol and sentence of the projection onto the domains; empty where no state is projected."""
    if any(s.domain.projected for s in symbols.variables()):
        return r"\Pi\bigl(", r" $\Pi$ projects states onto their sets."
    if any(c.relation == "<=" for c in symbols.program.defects):
        return r"\Pi\bigl(", r" $\Pi$ keeps multipliers of inequalities $\ge 0$."
    return "", ""


def _states(symbols: Symbols) -> str:
    """What the states' variables are called: h, the mean and deviation of classes, free inputs."""
    names = dict.fromkeys(letter for s in symbols.variables() for letter in s.storage.letters)
    return ", ".join([*names, *(symbols.bare(d.name) for d in symbols.program.data if d.free)])


def _first_order(symbols: Symbols, options: Options) -> list[str]:
    project, note = _projection(symbols)
    close = r"\bigr)" if project else ""
    duals = bool(symbols.program.multipliers) and not options["dual_sweep"]
    kept = _states(symbols)
    parts = [("\\theta", r"\nabla_{\theta} \mathcal{L}")]
    parts += [(kept, rf"\nabla_{{{kept}}} \mathcal{{L}}")] if kept else []
    parts += [(r"\lambda", r"-\nabla_{\lambda} \mathcal{L}")] if duals else []
    z = rf"z = ({', '.join(p for p, _ in parts)})"
    field = r"F(z) = \bigl(" + r",\, ".join(g for _, g in parts) + r"\bigr)"
    half = "t+\\frac12"
    schemes = {
        "extragradient": (
            rf"z^{{{half}}} &= {project}z^{{t}} - A\, F(z^{{t}}){close}",
            rf"z^{{t+1}} &= {project}z^{{t}} - A\, F(z^{{{half}}}){close}",
        ),
        "extragradient_from_past": (
            rf"z^{{{half}}} &= {project}z^{{t}} - A\, F(z^{{t-\frac12}}){close}",
            rf"z^{{t+1}} &= {project}z^{{t}} - A\, F(z^{{{half}}}){close}",
        ),
        "optimistic": (rf"z^{{t+1}} &= {project}z^{{t}} - A\, \bigl(2 F(z^{{t}}) - F(z^{{t-1}})\bigr){close}",),
        "descent_ascent": (rf"z^{{t+1}} &= {project}z^{{t}} - A\, F(z^{{t}}){close}",),
    }
    lines = [f"With ${z}$ and ${field}$, each step on a batch makes"]
    lines += _display(*schemes[options["kind"]])
    rules = {"weights": r"\theta", "states": kept, "multipliers": r"\lambda" if duals else ""}
    said = _rules(options, {k: v for k, v in rules.items() if v})
    each = (
        ""
        if not kept
        else f" Gradients in ${kept}{', ' + chr(92) + 'lambda' if duals else ''}$ are those of one example."
    )
    lines.append(rf"$A$ stands for the step rules, which act by entries. {said}{each}{note}")
    if options["dual_sweep"]:
        lines.append(r"$\lambda$ is set by solving $\nabla_h \mathcal{L} = 0$ from the last stage to the first.")
    if options["inner_steps"]:
        lines.append(rf"Ahead of each step, {options['inner_steps']} such steps are made on $h$ and $\lambda$ alone.")
    return lines


def _augmented(symbols: Symbols, options: Options) -> list[str]:
    duals = bool(symbols.program.multipliers)
    step = r"\rho" if options["dual_step"] is None else number(options["dual_step"])
    lines = [
        r"h &\leftarrow h - A_h\, \nabla_{h} \mathcal{L} \quad (" + str(options["state_steps"]) + r"\ \text{times})"
    ]
    if duals:
        lines.append(rf"\lambda &\leftarrow \lambda + {step}\, \nabla_{{\lambda}} \mathcal{{L}}")
    rounds = options["rounds"]
    said = "once" if rounds == 1 else f"{rounds} times"
    return [
        f"Each step repeats {said}",
        *_display(*lines),
        "and then moves the weights:",
        *_display(r"\theta &\leftarrow \theta - A_{\theta}\, \nabla_{\theta} \mathcal{L}"),
        r"The gradients in $h$ and $\lambda$ are those of one example. "
        + _rules(options, {"weights": r"\theta", "states": "h"}),
    ]


def _altmin(symbols: Symbols, options: Options) -> list[str]:
    del symbols
    steps = options["code_steps"]
    lines = [
        r"States start at a forward pass. With $E^{(i)}$ the loss and the quadratic terms of one example and "
        r"$\mu = \rho / 2$, for $k = K, \dots, 1$",
        *_display(
            r"h_k^{(i)} &\leftarrow h_k^{(i)} - A_h\, \nabla_{h_k} E^{(i)} / \mu "
            rf"\quad ({steps}\ \text{{times}})"
        ),
        r"where $f_{k-1}(h_{k-1}^{(i)})$ is held at its value ahead; then, each stage on its own "
        "and the last along the loss,",
    ]
    if options["hidden"] == "sign_hinge":
        local = r"\sum_i \mathbf{1}^{\top} \max\bigl(-f_{k-1}(h_{k-1}^{(i)};\, \theta_{k-1}) \odot "
        local += r"\operatorname{sign}(h_k^{(i)}),\, 0\bigr)"
    else:
        local = r"\sum_i \bigl\lVert f_{k-1}(h_{k-1}^{(i)};\, \theta_{k-1}) - h_k^{(i)} \bigr\rVert^2"
    lines += _display(rf"\theta_{{k-1}} &\leftarrow \theta_{{k-1}} - A_\theta\, \nabla_{{\theta_{{k-1}}}} {local}")
    if options["memory"]:
        lines.append(
            "Hidden linear layers are instead fitted by coordinate descent to the accumulated second moments of their "
            "inputs and codes."
        )
    lines.append(_rules(options, {"weights": r"\theta", "output": r"\theta_K", "codes": "h"}))
    return lines


def _proxprop(symbols: Symbols, options: Options) -> list[str]:
    del symbols
    solve = options["implicit"]
    how = "exactly" if solve["kind"] == "exact" else f"by {solve['iterations']} conjugate-gradient steps"
    return [
        r"With $h$ from a forward pass and $z_k$ the output of the affine layer $\phi_k$ in stage $k$, a backward "
        r"sweep of gradient steps gives targets $z_k - \delta_k$; each layer moves along "
        r"$\theta_k - \theta_k^{+}$ with",
        *_display(
            r"\theta_k^{+} = \operatorname*{arg\,min}_{\theta} \; \tfrac12 \sum_i \bigl\lVert \phi_k(\theta, a_k^{(i)})"
            r" - z_k^{(i)} + \delta_k^{(i)} \bigr\rVert^2 + \tfrac{1}{2 \tau} \lVert \theta - \theta_k \rVert^2"
        ),
        rf"and $\tau = {number(options['tau'])}$, solved {how}; the last stage takes its gradient. "
        + _rules(options, {"weights": r"\theta"}),
    ]


def _backprop(symbols: Symbols, options: Options) -> list[str]:
    del symbols
    return [
        "All states are eliminated: with $J$ the objective of the network that is not cut,",
        *_display(r"\theta^{t+1} = \theta^{t} - A_\theta\, \nabla_\theta J(\theta^{t})"),
        _rules(options, {"weights": r"\theta"}),
    ]


def _feedback(symbols: Symbols, options: Options) -> list[str]:
    del symbols
    return [
        r"With fixed random matrices $B_k$ and the output's error $e^{(i)} = \partial \ell^{(i)} / "
        r"\partial \hat{y}^{(i)}$,",
        *_display(
            r"\delta_k^{(i)} &= B_k^{\top} e^{(i)}",
            r"\theta_{k-1} &\leftarrow \theta_{k-1} - A_\theta\, \nabla_{\theta_{k-1}} \sum_i \bigl\langle "
            r"\delta_k^{(i)},\, f_{k-1}(h_{k-1}^{(i)};\, \theta_{k-1}) \bigr\rangle",
        ),
        rf"The entries of $B_k$ have standard deviation ${number(options['scale'])} / \sqrt{{d_{{\hat{{y}}}}}}$; the "
        "last stage takes its gradient. " + _rules(options, {"weights": r"\theta"}),
    ]


def _targets(symbols: Symbols, options: Options) -> list[str]:
    del symbols
    eta, noise = number(options["target_step"]), number(options["noise"])
    return [
        r"With $h$ from a forward pass and learned maps $g_k$ from state $k+1$ back to state $k$, the targets are",
        *_display(
            rf"\hat{{h}}_K^{{(i)}} &= h_K^{{(i)}} - {eta}\, \partial \ell^{{(i)}} / \partial h_K^{{(i)}}",
            r"\hat{h}_k^{(i)} &= h_k^{(i)} + g_k(\hat{h}_{k+1}^{(i)}) - g_k(h_{k+1}^{(i)}), \qquad k < K",
        ),
        "and each stage moves towards its own, the last one along the loss:",
        *_display(
            r"\theta_{k-1} &\leftarrow \theta_{k-1} - A_\theta\, \nabla_{\theta_{k-1}} \sum_i \bigl\lVert "
            r"f_{k-1}(h_{k-1}^{(i)};\, \theta_{k-1}) - \hat{h}_k^{(i)} \bigr\rVert^2"
        ),
        rf"Each $g_k$ learns to give back $h_k + \nu$ from $f_k(h_k + \nu)$, $\nu$ of standard deviation ${noise}$. "
        + _rules(options, {"weights": r"\theta", "inverses": "g"}),
    ]


def _sqp(symbols: Symbols, options: Options) -> list[str]:
    del symbols
    hessians = {"exact": "the Hessian", "gauss_newton": "the Gauss-Newton matrix", "bfgs": "a quasi-Newton estimate"}
    return [
        r"With $x = (\theta, h)$, objective $f$, equations $c(x) = 0$ and inequalities $g(x) \le 0$, each iteration "
        "solves",
        *_display(
            r"\min_{p} \quad & \tfrac12 p^{\top} H p + \nabla f(x)^{\top} p",
            r"\text{subject to} \quad & c(x) + \nabla c(x)^{\top} p = 0, \qquad g(x) + \nabla g(x)^{\top} p \le 0",
        ),
        rf"with $H$ {hessians[options['hessian']]} of the Lagrangian, made convex where it is not, and steps along $p$ "
        rf"as far as a filter allows, until the KKT residuals are at most ${number(options['tolerance'])}$.",
    ]


def _convex(symbols: Symbols, options: Options) -> list[str]:
    del symbols
    return [
        "With the weights or the inputs fixed such that it is convex, the program is solved as a cone program, to "
        rf"residuals of at most ${number(options['tolerance'])}$."
    ]


def _mixed(symbols: Symbols, options: Options) -> list[str]:
    del symbols
    return [
        r"Each piecewise-linear unit is written with a binary $b \in \{0, 1\}$ and bounds $l \le z \le u$ of its "
        r"input, a unit $h = \max(z, 0)$ as",
        *_display(r"h \ge z, \qquad h \ge 0, \qquad h \le z - l\,(1 - b), \qquad h \le u\, b"),
        rf"and the mixed-integer program is solved until the bounds on its optimum differ by at most "
        rf"${number(options['gap'])}$, relatively.",
    ]


_METHODS: Mapping[str, Callable[[Symbols, Options], list[str]]] = {
    "extragradient": _first_order,
    "extragradient_from_past": _first_order,
    "optimistic": _first_order,
    "descent_ascent": _first_order,
    "augmented_lagrangian": _augmented,
    "altmin": _altmin,
    "proxprop": _proxprop,
    "backprop": _backprop,
    "dfa": _feedback,
    "dtp": _targets,
    "sqp": _sqp,
    "convex": _convex,
    "mixed_integer": _mixed,
}
