"""How kernels are launched: grid, block, warps; the one place that says so."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tritonimplicit_kernels.layout import MAX_P
from tritonimplicit_kernels.triton.start import start

# A block is 8 KiB of a vector: with 8 warps, two 128-bit loads a thread on NVIDIA, one on AMD.
_BLOCK_BYTES: Final = 8192
_WARPS: Final = 8
_CHUNK: Final = 2048
_MAX_PROGRAMS: Final = 2**31 - 1
"""On a grid's first dimension, the only one used: the others end at 65,535."""


def partial_count(ld: int) -> int:
    """Return P, the number of chunks that a row of `ld` elements is cut into."""
    return min(MAX_P, -(-ld // _CHUNK))


def grid(batch: int, partials: int) -> int:
    """Return B P, how many programs are launched.

    Raises ValueError where that is more than a grid has.
    """
    programs = batch * partials
    if programs > _MAX_PROGRAMS:
        raise ValueError(
            f"{batch} systems with {partials} partial sums each need {programs} programs, but a "
            f"grid has at most {_MAX_PROGRAMS}: solve fewer systems at a time"
        )
    return programs


def launch(kernel: Any, vector: Tensor, partials: Tensor, *args: Tensor | int) -> None:
    """Run `kernel(*args, ld // 16, P)` with P programs for each row of `vector` (B, ld).

    `partials` (..., P) says P.

    Raises ValueError where B P is more than a grid has programs.
    """
    batch, ld = vector.shape
    count = partials.shape[-1]
    programs = grid(batch, count)
    if programs == 0:
        return
    with torch.cuda.device_of(vector):  # Triton launches on the current device
        start(
            kernel,
            vector.get_device(),
            programs,
            (*args, ld // 16, count),
            (MAX_P, _BLOCK_BYTES // vector.element_size()),
            _WARPS,
        )
