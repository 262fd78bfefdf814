"""k dots of one vector with a basis, k + 1 passes: the first launch of an Arnoldi step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.history import launch_rows, load_rows
from tritonimplicit_kernels.triton.programs import chunk_bounds


@triton.jit(do_not_specialize=["count", "ld16", "P"])
def _multi_dot_kernel(
    w_ptr,
    basis_ptr,
    count,
    state_ptr,
    products_ptr,
    ld16,
    P,
    MAX_P: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    b = (pid // P).to(tl.int64)
    rows = tl.arange(0, K)
    have = rows < count
    sums = tl.zeros([K, BLOCK], tl.float64)
    if tl.load(state_ptr + b) < 0:
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        w_ptr += b * ld
        basis_ptr += b * ld
        row_offsets = rows * ((programs // P) * ld)
        lanes = tl.arange(0, BLOCK)
        for s in range(start, whole, BLOCK):
            w = tl.load(w_ptr + s + lanes).to(tl.float64)
            sums += load_rows(basis_ptr, row_offsets, have, s + lanes, None) * w[None, :]
        if whole < end:
            tail = whole + lanes
            w = tl.load(w_ptr + tail, mask=tail < end, other=0.0).to(tl.float64)
            sums += load_rows(basis_ptr, row_offsets, have, tail, tail < end) * w[None, :]
    tl.store(products_ptr + rows * programs + pid, tl.sum(sums, axis=1), mask=have)


def multi_dot(w: Tensor, basis: Tensor, count: int, state: Tensor, products: Tensor) -> None:
    """Write the partial sums of basis[j].w into `products[j]`, zero for a frozen system."""
    launch_rows(_multi_dot_kernel, basis, products.shape[-1], w, basis, count, state, products)
