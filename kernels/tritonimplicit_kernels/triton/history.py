"""What the kernels on a basis or history of vectors (K, B, ld) share.

A program takes its chunk of one row from all K vectors at once, as tiles (K, BLOCK). K, the
capacity, is rounded up to a power of two; how many of the vectors are there is a run-time number,
and no others are loaded.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.layout import MAX_P
from tritonimplicit_kernels.triton.launch import grid
from tritonimplicit_kernels.triton.start import start

# A tile is 16 KiB: with 8 warps, four 128-bit loads a thread.
_TILE_BYTES: Final = 16384
_WARPS: Final = 8


@triton.jit
def load_rows(history_ptr, row_offsets, have, offsets, mask):
    """Load a tile (K, BLOCK) in float64; zero where `have` (K,) or `mask` (BLOCK,) is not."""
    wanted = have[:, None] if mask is None else have[:, None] & mask[None, :]
    pointers = history_ptr + row_offsets[:, None] + offsets[None, :]
    return tl.load(pointers, mask=wanted, other=0.0).to(tl.float64)


@triton.jit
def fold_rows(partials_ptr, stride, rows, have, P, MAX_P: tl.constexpr, K: tl.constexpr):
    """Add up the P float64 partial sums of each row: (K,), by the same tree in every program."""
    WIDTH: tl.constexpr = MAX_P if K * MAX_P <= 2048 else max(2048 // K, 1)
    total = tl.zeros([K], tl.float64)
    lanes = tl.arange(0, WIDTH).to(tl.int64)
    for first in tl.static_range(0, MAX_P, WIDTH):
        offsets = first + lanes
        wanted = have[:, None] & (offsets < P)[None, :]
        pointers = partials_ptr + rows[:, None] * stride + offsets[None, :]
        total += tl.sum(tl.load(pointers, mask=wanted, other=0.0), axis=1)
    return total


def launch_rows(kernel: Any, history: Tensor, partials: int, *args: Tensor | int | float) -> None:
    """Run `kernel(*args, ld // 16, P)`, P = `partials` programs for each row of a (K, B, ld).

    Raises ValueError where B P is more than a grid has programs.
    """
    capacity, batch, ld = history.shape
    programs = grid(batch, partials)
    if programs == 0:
        return
    rows = max(8, triton.next_power_of_2(capacity))
    with torch.cuda.device_of(history):  # Triton launches on the current device
        start(
            kernel,
            history.get_device(),
            programs,
            (*args, ld // 16, partials),
            (MAX_P, rows, max(16, _TILE_BYTES // history.element_size() // rows)),
            _WARPS,
        )
