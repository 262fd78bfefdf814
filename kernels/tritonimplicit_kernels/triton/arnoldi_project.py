"""Second launch of an Arnoldi step: one projection, and the dots of the next, k + 2 passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.history import fold_rows, launch_rows, load_rows
from tritonimplicit_kernels.triton.programs import chunk_bounds


@triton.jit
def _project_block(w_ptr, w_out_ptr, basis_ptr, h, row_offsets, have, offsets, mask, other):
    """Project one block of w; return its products with the basis and its squares in float64."""
    w = tl.load(w_ptr + offsets, mask=mask, other=other)
    basis = load_rows(basis_ptr, row_offsets, have, offsets, mask)
    rest = (w.to(tl.float64) - tl.sum(basis * h[:, None], axis=0)).to(w.dtype)
    tl.store(w_out_ptr + offsets, rest, mask=mask)
    rest64 = rest.to(tl.float64)
    return basis * rest64[None, :], rest64 * rest64


@triton.jit(do_not_specialize=["count", "ld16", "P"])
def _arnoldi_project_kernel(
    w_ptr,
    basis_ptr,
    count,
    first_ptr,
    state_ptr,
    w_out_ptr,
    second_ptr,
    ww_ptr,
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
    squares = tl.zeros([BLOCK], tl.float64)
    if tl.load(state_ptr + b) < 0:
        h = fold_rows(first_ptr + b * P, programs, rows, have, P, MAX_P, K)
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        w_ptr += b * ld
        w_out_ptr += b * ld
        basis_ptr += b * ld
        row_offsets = rows * ((programs // P) * ld)
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        for s in range(start, whole, BLOCK):
            dots, square = _project_block(
                w_ptr, w_out_ptr, basis_ptr, h, row_offsets, have, s + lanes, None, None
            )
            sums += dots
            squares += square
        if whole < end:
            tail = whole + lanes
            dots, square = _project_block(
                w_ptr, w_out_ptr, basis_ptr, h, row_offsets, have, tail, tail < end, 0.0
            )
            sums += dots
            squares += square
    tl.store(second_ptr + rows * programs + pid, tl.sum(sums, axis=1), mask=have)
    tl.store(ww_ptr + pid, tl.sum(squares, axis=0))


def arnoldi_project(
    w: Tensor,
    basis: Tensor,
    count: int,
    first: Tensor,
    state: Tensor,
    w_out: Tensor,
    second: Tensor,
    ww: Tensor,
) -> None:
    """Write w less its part in the basis, and the partial sums of that rest's dots."""
    launch_rows(
        _arnoldi_project_kernel,
        basis,
        ww.shape[-1],
        w,
        basis,
        count,
        first,
        state,
        w_out,
        second,
        ww,
    )
