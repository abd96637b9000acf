"""What models hold besides plain layers: sparse weights and gradients, hooks, TorchScript, generators, no values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import lagcompile as lc
from tests.frontend.sameness import right_or_refused

X = torch.linspace(-1.0, 1.0, 36).reshape(6, 6)
Y = torch.arange(6) % 3


class Net(nn.Module):
    """Three layers, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.between(self.b(torch.relu(self.a(x)))))


class Adjacent(Net):
    """A graph convolution over features: a sparse matrix as a buffer."""

    adjacency: Tensor

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        with warnings.catch_warnings(action="ignore"):
            dense = (torch.arange(64).reshape(8, 8) % 3 == 0).float()
            self.register_buffer("adjacency", dense.to_sparse(layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.c(torch.tanh(self.b((self.adjacency @ h.t()).t())))


class Words(nn.Module):
    """An embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8, sparse=True)
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.embedding(tokens).mean(1))))


class Registers(Net):
    """A table that is made when it is needed."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.arange(8.0) / 8)
        return self.c(torch.tanh(self.b(self.a(x)) + self.table))


class Noisy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(x.shape, generator=self.generator))


class Broken(torch.autograd.Function):
    """A forward that runs, a backward that does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


class Cropped(torch.autograd.Function):
    """A gradient of another shape than the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][:, :3]


def _overwritten(x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    y += 1  # the backward of sigmoid needs what stood there
    return y


def _solved(model: nn.Module, x: Tensor, split: int = 3) -> lc.Solution:
    lifted = lc.lift(model, x, split=split)
    assert lifted.verify(x, Y, loss=functional.cross_entropy).ok
    return lifted.solve((x, Y), loss=functional.cross_entropy, options=lc.RunOptions(steps=3))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_are_the_models(layout: torch.layout) -> None:
    lifted = lc.lift(model := Adjacent(layout), X, split=3)
    assert torch.equal(lifted.eval()(X), model.eval()(X))
    assert lifted.receipt is not None
    assert lifted.receipt.modes[0].slopes is not None


def test_sparse_gradients_are_solved_and_certified() -> None:
    solution = _solved(Words(), torch.arange(30).reshape(6, 5) % 12)
    assert solution.certificate is not None
    assert solution.certificate.ok


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_a_weight_that_a_hook_makes_ahead_of_each_forward() -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)
    )
    lifted = lc.lift(model, X, split=3)
    with torch.no_grad():
        for m in (model, lifted.module):
            m.get_parameter("2.weight_orig").mul_(torch.linspace(0.5, 1.5, 8))
    assert torch.allclose(lifted.eval()(X), model.eval()(X), atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_are_kept_and_a_scripted_model_is_refused() -> None:
    with warnings.catch_warnings(action="ignore"):
        scripted, traced = torch.jit.script(Net()), torch.jit.trace(Net(), X)
        part = nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3))
    for model in (scripted, traced):
        with pytest.raises(lc.LiftError, match=r"TorchScript module .*: lift the module that it was made of"):
            lc.lift(model, X, split=2)
    assert right_or_refused(part, X, split=2, sizes=(1, 3)) == ""


def test_weights_without_values_are_named() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(lc.LiftError, match=r"'a.weight', 'a.bias', .* on the meta device"):
        lc.lift(model, X.to("meta"), split=2)


def test_buffers_of_the_first_run() -> None:
    model = Registers()
    with pytest.raises(
        lc.LiftError, match="registers the buffer 'table' when it runs for the first time: run the model"
    ):
        lc.lift(model, X, split=2)
    model(X)
    assert right_or_refused(model, X, split=2, sizes=(1, 3)) == ""


def test_a_generator_of_its_own_is_named() -> None:
    with pytest.raises(lc.LiftError, match=r"test_held\.py:\d+: .* draws from a private generator"):
        lc.lift(Noisy(), X, split=2)


@pytest.mark.parametrize(
    ("between", "said"),
    [(Broken.apply, "no such kernel"), (Cropped.apply, "invalid gradient"), (_overwritten, "inplace operation")],
)
def test_a_backward_pass_that_fails_is_the_models_own(between: Callable[[Tensor], Tensor], said: str) -> None:
    lifted = lc.lift(Net(between), X, split=2)
    with pytest.raises(lc.BindError, match=f"the model's own backward pass fails: .*{said}"):
        lifted.solve((X, Y), loss=functional.cross_entropy)
    with pytest.raises(lc.BindError, match=f"backward pass of the model or the loss fails in float64: .*{said}"):
        lifted.verify(X, Y, loss=functional.cross_entropy)


def test_a_state_whose_batch_is_not_first_can_be_viewed() -> None:
    class Turned(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).view(-1, 2, 4).transpose(0, 1).contiguous()  # (2, batch, 4)
            h = h.view(2, -1, 2).tanh().view(2, -1, 4)
            return self.c(self.b(h.transpose(0, 1).reshape(-1, 8)))

    lifted = lc.lift(Turned(), X, split=lc.AtSplit(after=("contiguous",)))
    assert [str(s.type.shape) for s in lifted.program.states] == ["(2, 'B', 4)"]
    assert lifted.solve((X, Y), loss=functional.cross_entropy, options=lc.RunOptions(steps=3)).steps == 3


def test_what_stands_in_the_way_of_more_stages_is_said() -> None:
    class Dropped(nn.Module):
        """LayerDrop."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not self.training or torch.rand(()) > 0.1:
                    x = torch.relu(layer(x))
            return x

    class Waves(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.fft.fft(self.a(x))
            return self.c(torch.fft.ifft(h * h.conj()).real[:, :8])

    with pytest.raises(lc.SplitError, match=r"at most \d .* '0' is kept whole: its forward draws random .*LayerDrop"):
        lc.lift(nn.Sequential(Dropped(), nn.Linear(6, 3)), X, split=5)
    with pytest.raises(lc.SplitError, match=r"complex values are no states: torch.view_as_real"):
        lc.lift(Waves(), X, split=7)


def test_padding_has_no_gradient_and_is_certified_all_the_same() -> None:
    class Padded(Words):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(12, 8, padding_idx=0)

    solution = _solved(Padded(), tokens := torch.arange(30).reshape(6, 5) % 4)
    assert (tokens == 0).any()
    assert solution.certificate is not None
    assert solution.certificate.ok


def test_packed_sequences_are_kept_whole_in_a_part_and_named_in_the_model() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(6, 8, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            return self.cell(packed)[1][0][-1]

    class Classifier(Packed):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Packed(), nn.Linear(8, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(x, lengths)))

    data = X[:, None].repeat(1, 5, 1), torch.tensor([5, 3, 4, 1, 2, 5])
    lifted = lc.lift(Classifier(), data, split=3)
    assert lifted.receipt is not None
    assert [path for path, _ in lifted.receipt.whole] == ["inner"]
    with pytest.raises(lc.LiftError, match=r"test_held\.py:\d+: .* packs sequences by the values of their lengths"):
        lc.lift(Packed(), data, split=2)
