"""Files that went bad on the disk: one bit, a lost end, a block of zeros."""

from __future__ import annotations

import random
from pathlib import Path


def damage(path: Path, generator: random.Random) -> str:
    """Damage a file that is not empty; says how."""
    data = bytearray(path.read_bytes())
    kind = generator.choice(("bit", "bit", "bit", "cut", "zeros"))
    place = generator.randrange(len(data))
    if kind == "bit":
        data[place] ^= 1 << generator.randrange(8)
    elif kind == "cut":
        del data[place:]
    else:
        end = min(len(data), place + generator.choice((1, 16, 512)))
        if not any(data[place:end]):
            data[place] ^= 1
        data[place:end] = bytes(end - place)
    if bytes(data) == path.read_bytes():  # zeros that were there
        data[place] ^= 1
    path.write_bytes(bytes(data))
    return f"{kind} at {place} of {path.name}"
