"""The words of drawn modules: expressions and statements by the kind of value that they make or change.

Places: f, h, g, c are values of a kind; capitals may be written into; t is what a statement writes into, s and n are
values of the same kind as t.
"""

from __future__ import annotations

FLAT, HALF, GRID, COLUMN = "flat", "half", "grid", "column"
"""Kinds of values: [B, 6], [B, 3], [B, 2, 3], [B]."""

INIT = """\
class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.s, self.r = nn.Linear(3, 3), nn.Linear(6, 3)
        self.p, self.w = nn.Parameter(torch.randn(6) * 0.5), nn.Parameter(torch.randn(6, 6) * 0.3)
        self.act, self.idrop, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.3, inplace=True), nn.Dropout(0.3)
        self.bn, self.ln = nn.BatchNorm1d(6), nn.LayerNorm(6)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
"""


def _words(text: str) -> tuple[str, ...]:
    """Templates, separated by bars."""
    return tuple(t.strip() for t in " ".join(text.split()).split(" | "))


PURE = {
    FLAT: _words(
        """
        self.a({f}) | self.b({f}) | self.c({f}) | torch.tanh({f}) | F.softplus({f}) | {f} + {f} | {f} * {f} |
        {f} - 0.5 * {f} | torch.where({f} > 0, {f}, {f}) | {f} * self.p | {f} @ self.w | {f}.clone() |
        torch.cat([{h}, {h}], 1) | self.drop({f}) | F.dropout({f}, 0.3, self.training) | self.bn({f}) | self.ln({f}) |
        Straight.apply({f}) | Scaled.apply({f}, {f}) | F.linear({f}, self.a.weight) | {f}.roll(1, 1) |
        {f}.masked_fill({f} > 0.7, 0.1) | torch.sigmoid({f}) * self.w.diagonal() | {f} + self.mean | {f}.flip(1) |
        {f}.scatter(1, {f}.argsort(1), {f}) | {f} + {c}.unsqueeze(1) | F.relu({f})
        """
    ),
    HALF: _words(
        """
        self.s({h}) | self.r({f}) | torch.tanh({h}) | {h} + {h} | {h} * 0.7 | {g}.sum(1) | {h}.clone()
        """
    ),
    GRID: _words(
        """
        torch.stack([{h}, {h}], 1) | torch.tanh({g}) | {g} + {h}.unsqueeze(1) | {g}.clone()
        """
    ),
    COLUMN: _words(
        """
        {f}.sum(1) | {h}.mean(1) | {c} * 0.3 | {f}.max(1)[0]
        """
    ),
}
FRESH = {
    FLAT: _words(
        """
        torch.zeros_like({f}) | torch.ones_like({f}) | {f}.new_zeros({f}.shape) | torch.zeros({f}.shape[0], 6) |
        {f}.clone() | {f} * 1.5 | self.a({f}) | torch.full_like({f}, 0.2) | {f} + 1.0
        """
    ),
    HALF: _words(
        """
        torch.zeros_like({h}) | {h}.clone() | {h} * 1.5 | self.r({f})
        """
    ),
    GRID: _words(
        """
        torch.zeros_like({g}) | {g}.clone() | {g} * 0.9 | {f}.new_zeros({f}.size(0), 2, 3)
        """
    ),
    COLUMN: _words(
        """
        torch.zeros_like({c}) | {c}.clone()
        """
    ),
}
VIEWS = {
    FLAT: _words(
        """
        {F}.contiguous() | {F}.t().t() | {F}.view(-1, 6) | {G}.flatten(1) | {G}.reshape(-1, 6) | {F}.detach() |
        {F}.data | {F}[:] | {F}.expand_as({F}) | {F}.view_as({f})
        """
    ),
    HALF: _words(
        """
        {F}[:, :3] | {F}[:, 3:] | {F}[:, ::2] | {F}.narrow(1, 2, 3) | {G}[:, 0] | {G}.select(1, 1)
        """
    ),
    GRID: _words(
        """
        {F}.view(-1, 2, 3) | {F}.reshape(-1, 2, 3) | {F}.unflatten(1, (2, 3)) | {G}.transpose(1, 2).mT
        """
    ),
    COLUMN: _words(
        """
        {F}[:, 0] | {F}.select(1, 2) | {H}[:, 1] | {F}.unbind(1)[3]
        """
    ),
}
ANY = _words(
    """
        {t} += {s} | {t} *= 0.9 | {t}.mul_(0.8) | {t}.add_({s}) | {t}.sub_({s}).mul_(0.5) | {t}[...] = {s} |
        {t}.copy_({s}) | {t}.fill_(0.3) | {t}.zero_() | {t}.relu_() | F.relu({t}, inplace=True) | self.act({t}) |
        self.idrop({t}) | {t}[{s} > 0.5] = 0.1 | {t}.masked_fill_({s} > 0.2, 0.4) | {t}.clamp_(-1.0, 1.0) |
        {t}.tanh_() | {t} -= 0.1 * {s} | {t}.data.mul_(0.9) | F.dropout({t}, 0.2, self.training, True) |
        torch.add({n}, {n}, out={t}) | {t}[0] = {s}[0] | {t}[:1] *= 2.0 | {t}.detach().add_(0.1) | {t}.lerp_({s}, 0.3)
        """
)
WRITES = {
    FLAT: _words(
        """
        {t}[:, :3] = {h} | {t}[:, 1] = {c} | {t}[:, :2] += {s}[:, 2:4] | {t}[:, [0, 2]] = {s}[:, [1, 0]] |
        {t}.index_copy_(1, torch.tensor([0, 4]), {s}[:, :2]) | {t}.scatter_(1, {s}.argsort(1), {s}) |
        {t}.chunk(2, 1)[0].add_({h}) | {t}.view(-1, 2, 3)[:, 0] = {h} | {t}[:, ::2].mul_({h}) |
        {t}.index_add_(1, torch.tensor([1, 5]), {s}[:, :2]) | {t}.select(1, 3).copy_({c}) | {t}[{s} > 0.8] *= 0.5 |
        {t}.index_fill_(1, torch.tensor([2]), 0.25) | {t}[:, 2:4] = 0.0
        """
    ),
    HALF: _words(
        """
        {t}[:, 0] = {c} | {t}[:, 1:].add_({s}[:, :2]) | {t}.unbind(1)[2].mul_(0.5)
        """
    ),
    GRID: _words(
        """
        {t}[:, 0] = {h} | {t}[:, 1, :2] = {s}[:, 0, 1:] | {t}[:, :, 0] += 0.2 | {t}.flatten(1)[:, 1] = {c}
        """
    ),
    COLUMN: _words(
        """
        {t}[1:] = 0.1
        """
    ),
}
