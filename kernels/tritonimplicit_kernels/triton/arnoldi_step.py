"""Third launch of an Arnoldi step: the next basis vector, H's column, GMRES's residual norm.

k + 2 passes. Ayachour, "A fast implementation for GMRES method", J. Comput. Appl. Math. 159, 2003.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.constants import (
    BREAKDOWN,
    CONVERGED,
    INF,
    MAX_ITERATIONS,
    NON_FINITE,
    RUNNING,
)
from tritonimplicit_kernels.triton.history import fold_rows, launch_rows, load_rows
from tritonimplicit_kernels.triton.programs import chunk_bounds, fold

_NEGLIGIBLE_FP32 = tl.constexpr((10 * 2.0**-23) ** 2)
_NEGLIGIBLE_FP64 = tl.constexpr((10 * 2.0**-52) ** 2)


@triton.jit
def _next_code(rr, size_sq, singular, iterations, threshold, maxiter):
    """Say what a running system turns to; the last rule that holds wins."""
    code = tl.where(singular, BREAKDOWN, RUNNING)
    code = tl.where(size_sq < INF, code, NON_FINITE)
    code = tl.where(iterations >= maxiter, MAX_ITERATIONS, code)
    code = tl.where(rr <= threshold, CONVERGED, code)
    return tl.where(rr < INF, code, NON_FINITE)


@triton.jit
def _next_block(w_ptr, basis_ptr, next_ptr, h, norm, row_offsets, have, offsets, mask, other):
    """Write one block of the next basis vector."""
    w = tl.load(w_ptr + offsets, mask=mask, other=other)
    basis = load_rows(basis_ptr, row_offsets, have, offsets, mask)
    rest = w.to(tl.float64) - tl.sum(basis * h[:, None], axis=0)
    tl.store(next_ptr + offsets, (rest / norm).to(w.dtype), mask=mask)


@triton.jit(do_not_specialize=["count", "capacity", "maxiter", "ld16", "P"])
def _arnoldi_step_kernel(
    w_ptr,
    basis_ptr,
    count,
    first_ptr,
    second_ptr,
    ww_ptr,
    left_ptr,
    column_ptr,
    norm_ptr,
    rr_ptr,
    state_ptr,
    threshold_ptr,
    maxiter: tl.int64,
    rr_out_ptr,
    state_out_ptr,
    residual_sq_ptr,
    capacity,
    ld16,
    P,
    MAX_P: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    batch = programs // P
    b = (pid // P).to(tl.int64)
    dtype = w_ptr.dtype.element_ty
    negligible: tl.constexpr = _NEGLIGIBLE_FP32 if dtype == tl.float32 else _NEGLIGIBLE_FP64
    rows = tl.arange(0, K)
    have = rows < count

    seen = tl.load(state_ptr + b)
    iterations = tl.load(state_ptr + batch + b)
    rr = fold(rr_ptr + b * P, P, MAX_P)
    more = fold_rows(second_ptr + b * P, programs, rows, have, P, MAX_P, K)
    h = fold_rows(first_ptr + b * P, programs, rows, have, P, MAX_P, K) + more
    height = capacity.to(tl.int64) + 1
    left_ptr += b * height
    column_ptr += b * height
    left = tl.load(left_ptr + rows, mask=have, other=0.0)
    norm_sq = tl.maximum(fold(ww_ptr + b * P, P, MAX_P) - tl.sum(more * more, axis=0), 0.0)
    size_sq = tl.sum(h * h, axis=0) + norm_sq
    left_sq = tl.sum(left * left, axis=0)
    dot = tl.sum(left * h, axis=0)
    closed = norm_sq <= size_sq * negligible  # the Krylov space is invariant
    singular = closed & (dot * dot <= size_sq * negligible * left_sq)
    threshold = tl.load(threshold_ptr + b)
    runs = seen < 0
    code = _next_code(rr, size_sq, singular, iterations, threshold, maxiter)
    code = tl.where(runs, code, seen)
    norm = tl.sqrt(norm_sq)
    growth = -dot / tl.where(closed, 1.0, norm)
    beta = tl.load(norm_ptr + b)
    remaining = tl.where(closed, 0.0, beta * beta / (left_sq + growth * growth))
    first = pid % P == 0
    if first:
        tl.store(state_out_ptr + b, code)
        tl.store(state_out_ptr + batch + b, iterations + (code < 0).to(tl.int32))
        tl.store(residual_sq_ptr + b, rr, mask=runs)
    if code < 0:
        if first:
            tl.store(column_ptr + rows, h, mask=have)
            tl.store(column_ptr + count, norm)
            tl.store(left_ptr + count, growth)
        if (count < capacity) & (norm_sq > size_sq * negligible):
            ld = ld16.to(tl.int64) * 16
            start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
            w_ptr += b * ld
            basis_ptr += b * ld
            stride = batch * ld
            next_ptr = basis_ptr + count * stride
            row_offsets = rows * stride
            lanes = tl.arange(0, BLOCK).to(tl.int64)
            for s in range(start, whole, BLOCK):
                _next_block(
                    *(w_ptr, basis_ptr, next_ptr, more, norm, row_offsets, have),
                    *(s + lanes, None, None),
                )
            if whole < end:
                tail = whole + lanes
                _next_block(
                    *(w_ptr, basis_ptr, next_ptr, more, norm, row_offsets, have),
                    *(tail, tail < end, 0.0),
                )
    tl.store(rr_out_ptr + pid, tl.where(first & (code < 0), remaining, 0.0))


def arnoldi_step(
    w: Tensor,
    basis: Tensor,
    count: int,
    first: Tensor,
    second: Tensor,
    ww: Tensor,
    left: Tensor,
    column: Tensor,
    norm: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    rr_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Advance each running system's Krylov space by one vector, or stop it."""
    launch_rows(
        _arnoldi_step_kernel,
        basis,
        rr_out.shape[-1],
        w,
        basis,
        count,
        first,
        second,
        ww,
        left,
        column,
        norm,
        rr,
        state,
        threshold,
        maxiter,
        rr_out,
        state_out,
        residual_sq,
        basis.shape[0],
    )
