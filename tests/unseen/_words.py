"""The words of drawn modules: expressions and statements by the kind of value that they make or change.

Places: f, h, g, c are values of a kind; capitals may be written into; t is what a statement writes into, s and n are
values of the same kind as t.
"""

from __future__ import annotations

FLAT, HALF, GRID, COLUMN = "flat", "half", "grid", "column"
"""Kinds of values: [B, 6], [B, 3], [B, 2, 3], [B]."""

LAYERS = {
    "a": "nn.Linear(6, 6)",
    "b": "nn.Linear(6, 6)",
    "c": "nn.Linear(6, 6)",
    "s": "nn.Linear(3, 3)",
    "r": "nn.Linear(6, 3)",
    "p": "nn.Parameter(torch.randn(6) * 0.5)",
    "w": "nn.Parameter(torch.randn(6, 6) * 0.3)",
    "z": "nn.Parameter(torch.randn(3, dtype=torch.complex128))",
    "act": "nn.ReLU(inplace=True)",
    "idrop": "nn.Dropout(0.3, inplace=True)",
    "drop": "nn.Dropout(0.3)",
    "bn": "nn.BatchNorm1d(6)",
    "ln": "nn.LayerNorm(6)",
    "gn": "nn.GroupNorm(2, 6)",
    "prelu": "nn.PReLU()",
    "wn": "nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))",
    "conv": "nn.Conv1d(2, 2, 3, padding=1)",
    "plane": "nn.Conv2d(1, 2, (2, 1))",
    "lstm": "nn.LSTM(3, 3, batch_first=True)",
    "gru": "nn.GRU(3, 3, batch_first=True)",
    "cell": "nn.GRUCell(6, 6)",
    "att": "nn.MultiheadAttention(3, 1, batch_first=True)",
    "enc": "nn.TransformerEncoderLayer(3, 1, 6, batch_first=True)",
    "emb": "nn.Embedding(2, 3)",
    "bil": "nn.Bilinear(3, 3, 6)",
    "seq": "nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.2))",
    "list": "nn.ModuleList([nn.Linear(6, 6), nn.Tanh()])",
    "table": "nn.ModuleDict({'one': nn.Linear(6, 6), 'two': nn.Sequential(nn.Linear(6, 6), nn.Tanh())})",
    "plist": "nn.ParameterList([torch.randn(6), torch.ones(6)])",
    "pdict": "nn.ParameterDict({'scale': torch.ones(6)})",
}
"""What a module may hold; it holds what its forward reads, and `ALWAYS`."""
ALWAYS = ("a", "b", "c")
HEAD = """\
class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
        self.last = self.mask = None
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
        {f}.scatter(1, {f}.argsort(1), {f}) | {f} + {c}.unsqueeze(1) | F.relu({f}) | self.gn({f}) | self.prelu({f}) |
        self.wn({f}) | self.seq({f}) | self.list[1](self.list[0]({f})) | self.table["two"](self.table["one"]({f})) |
        sum(p * {f} for p in self.plist) | {f} * self.pdict["scale"] | self.cell({f}, {f}) | self.bil({h}, {h}) |
        torch.func.functional_call(self.a, {"weight": self.b.weight * 2.0, "bias": self.p}, ({f},)) |
        {f}.gather(1, {f}.argsort(1)) | {f}.sort(1)[0] | {f}.topk(6, 1)[0] | {f}.cumsum(1) |
        {f}.index_select(1, torch.tensor([5, 4, 3, 2, 1, 0])) | torch.einsum("bi,ij->bj", {f}, self.w) |
        {f}.index_put((torch.arange({f}.shape[0]), {f}.argmax(1)), {c}) | torch.softmax({f}, 1) |
        torch.fft.irfft(torch.fft.rfft({f}, dim=1), n=6, dim=1) | F.one_hot({f}.argmax(1), 6) * {f} |
        {f} * ({f} > 0.1).float() | ({f} * 3.0).round().long().double() * self.p | {f}.type_as({f}).to(torch.float64) |
        torch.cat({g}.unbind(1), 1) | torch.stack({f}.split(1, 1)).sum(0) + {f} | torch.clamp({f}, max=1.0) |
        F.pad({h}, (0, 3)) | torch.minimum({f}, {f}) | {f}.norm(dim=1, keepdim=True) * {f} |
        torch.utils.checkpoint.checkpoint(self.b, {f}, use_reentrant=False)
        """
    ),
    HALF: _words(
        """
        self.s({h}) | self.r({f}) | torch.tanh({h}) | {h} + {h} | {h} * 0.7 | {g}.sum(1) | {h}.clone() |
        torch.complex({h}, {h}).abs() | (torch.complex({h}, {h}) * self.z).imag | self.emb(({c} > 0).long()) |
        {g}.max(1).values | self.lstm({g})[1][0][0] | torch.where({c}.unsqueeze(1) > 0, {h}, {h}) |
        {g}.gather(1, ({h} > 0).long().unsqueeze(1)).squeeze(1) | torch.einsum("bij,bi->bj", {g}, {h}[:, :2])
        """
    ),
    GRID: _words(
        """
        torch.stack([{h}, {h}], 1) | torch.tanh({g}) | {g} + {h}.unsqueeze(1) | {g}.clone() | self.conv({g}) |
        self.plane({g}.unsqueeze(1)).squeeze(2) | self.lstm({g})[0] | self.gru({g})[0] | self.att({g}, {g}, {g})[0] |
        self.enc({g}) | F.scaled_dot_product_attention({g}, {g}, {g}) | torch.bmm({g} @ {g}.mT, {g}) |
        {g}.permute(0, 2, 1).reshape(-1, 2, 3) | {g}.repeat_interleave(2, 1)[:, ::2]
        """
    ),
    COLUMN: _words(
        """
        {f}.sum(1) | {h}.mean(1) | {c} * 0.3 | {f}.max(1)[0] | torch.logsumexp({f}, 1) | {f}.std(1) |
        torch.einsum("bi,bi->b", {f}, {f}) | (({f} > 0).sum(1) % 2).double() | {f}.median(1).values
        """
    ),
}
FRESH = {
    FLAT: _words(
        """
        torch.zeros_like({f}) | torch.ones_like({f}) | {f}.new_zeros({f}.shape) | torch.zeros({f}.shape[0], 6) |
        {f}.clone() | {f} * 1.5 | self.a({f}) | torch.full_like({f}, 0.2) | {f} + 1.0 |
        torch.empty({f}.shape).fill_(0.5) | {f}.new_ones({f}.size(0), 6) | torch.zeros(len({f}), 6)
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
LOOPS = _words(
    """
        {o}[:, i] = {n}[:, i] | {o}[:, i] = {n}.sum(1) | {o}[:, i].copy_({n}[:, 0]) | {o}[:, 5 - i] = {n}[:, i]
        """
)
"""What a recurrent loop does in turn i of 6 with its state n and an output o."""
BUFFERS = _words(
    """
        self.count += 1 | self.mean.mul_(0.9).add_(0.1 * {f}.detach().mean(0)) | self.count = self.count + 1 |
        self.mean.copy_({f}.detach().mean(0)) | self.mean[:3] = {h}.detach().mean(0)
        """
)
REGIONS = _words(
    """
        torch.no_grad() | torch.no_grad() | torch.set_grad_enabled(False) | torch.enable_grad() | torch.inference_mode()
        """
)
SIDES = _words(
    """
        {f} | {h} | {g} | {c} | x | {f}.sum() | {f}.argmax(1) | {f} > 0.0 | ({f} > 0.0).any(1) | x.shape[0] | None |
        "done" | self.a.weight | torch.complex({h}, {h}) | {f}.detach()
        """
)
"""What a module returns beside its main value."""
OUTPUTS = _words(
    """
        {main} | {main} | {main} | {main}, {side} | {side}, {main} | [{main}, {side}] | x, {main} |
        {"main": {main}, "side": {side}} | Pair({main}, {side}) | Record({main}, {side}) |
        {main}, {"deep": ({side}, {main})} | {main}, self.c({main}) | Pair({side}, [Record({main}), {main}]) |
        OrderedDict(main={main}, side={side})
        """
)
PARTS = (
    ("{main}", ""),
    ("({main}, {side})", "[0]"),
    ('{"main": {main}}', '["main"]'),
    ("Pair({side}, {main})", ".second"),
)
"""What a sub-module returns, and how its caller reads the main value of it."""
