"""A split spec written by hand, then changed: where to cut is a text file, and a wrong one is told by its line.

Run: python examples/split_spec.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lagcompile as lc

BY_HAND = """\
split:
  policy: at
  after: [encoder, decoder.0]     # two breakpoints, so three stages
"""


class Net(nn.Module):
    """An encoder, a decoder, and a skip connection that crosses every cut behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encoder(x)
        return self.head(self.decoder(h) + h)


def main() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 6)
    path = Path(tempfile.mkdtemp()) / "split.yaml"

    path.write_text(BY_HAND)
    first = lc.lift(model, (x,), split=path)
    print(first.plan(examples=16))
    crossing = [b.crossing for b in first.partition.breakpoints]
    print("what crosses each cut:", crossing)

    path.write_text(BY_HAND.replace("[encoder, decoder.0]", "[encoder, decoder.1, decoder]"))
    second = lc.lift(model, (x,), split=path)
    print(second.plan(examples=16))

    path.write_text(BY_HAND.replace("decoder.0", "decodr.0"))
    try:
        lc.lift(model, (x,), split=path)
        message = ""
    except lc.SplitError as error:
        message = str(error)
    print("a wrong spec:", message)

    assert (len(first.stages), len(second.stages)) == (3, 4)
    assert "encoder_1" in crossing[1], "the skip connection is carried past the second cut"
    assert torch.equal(first(x), model(x)), "cutting changes nothing of what the network computes"
    assert torch.equal(second(x), model(x))
    assert "did you mean 'decoder.0'" in message


if __name__ == "__main__":
    main()
