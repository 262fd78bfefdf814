"""What the kernels share: how a program finds its chunk of a row, and adds up partial sums.

A grid has B * P programs on one dimension, P of them a row: program `b * P + i` does chunk i of
row b. Chunks are whole blocks, except for a row's end.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_bounds(i, ld, P, BLOCK: tl.constexpr):
    """Return where chunk i of a row begins, where its last whole block ends, and where it ends."""
    blocks = tl.cdiv(tl.cdiv(ld, BLOCK), P)
    start = tl.minimum(i * blocks * BLOCK, ld)
    end = tl.minimum(start + blocks * BLOCK, ld)
    whole = start + (end - start) // BLOCK * BLOCK
    # Rows are multiples of 16 elements, but the minimum hides it, and with it the 128-bit loads.
    return tl.multiple_of(start, 16), tl.multiple_of(whole, 16), tl.multiple_of(end, 16)


@triton.jit
def fold(partials_ptr, P, MAX_P: tl.constexpr):
    """Add up P float64 partial sums, by the same tree in every program."""
    offsets = tl.arange(0, MAX_P)
    return tl.sum(tl.load(partials_ptr + offsets, mask=offsets < P, other=0.0), axis=0)
