"""Real text that every machine with Python has: the sources of its standard library."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 4096
HELD_OUT_EVERY = 20
BYTES = 2**22
"""Of text, at most."""


@functools.cache
def _corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and every twentieth block, held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    joined = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:BYTES]
    text = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    blocks = torch.arange(len(text)) // BLOCK
    held_out = blocks % HELD_OUT_EVERY == 7
    return text[~held_out], text[held_out]


def batches(
    count: int, size: int, context: int, seed: int, held_out: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of bytes (size, context) and those that follow each, from places drawn by the seed."""
    text = _corpus()[held_out]
    rng = torch.Generator().manual_seed(seed)
    places = torch.randint(len(text) - context, (count, size), generator=rng)
    windows = text[places[..., None] + torch.arange(context + 1)].long()
    return [(window[:, :-1], window[:, 1:]) for window in windows]
