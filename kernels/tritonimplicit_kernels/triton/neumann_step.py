"""One iteration of the Neumann series as Richardson's, x += alpha (b - A x): 4 passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.constants import (
    CONVERGED,
    DIVERGED,
    INF,
    MAX_ITERATIONS,
    NON_FINITE,
    RUNNING,
)
from tritonimplicit_kernels.triton.launch import launch
from tritonimplicit_kernels.triton.programs import chunk_bounds, fold
from tritonimplicit_kernels.triton.vectors import read_block, read_tail


@triton.jit
def _next_code(rr, iterations, threshold, limit, maxiter):
    """Say what a running system turns to; the last rule that holds wins."""
    code = tl.where(iterations >= maxiter, MAX_ITERATIONS, RUNNING)
    code = tl.where(rr > limit, DIVERGED, code)
    code = tl.where(rr <= threshold, CONVERGED, code)
    return tl.where(rr < INF, code, NON_FINITE)


@triton.jit
def _update_block(x_ptr, ax, b_ptr, alpha, offsets, mask, other):
    """Update one block of x; return the squares of the residual in float64."""
    residual = tl.load(b_ptr + offsets, mask=mask, other=other) - ax
    x = tl.load(x_ptr + offsets, mask=mask, other=other)
    tl.store(x_ptr + offsets, x + alpha * residual, mask=mask)
    residual64 = residual.to(tl.float64)
    return residual64 * residual64


@triton.jit(do_not_specialize=["maxiter", "ld16", "P"])
def _neumann_step_kernel(
    x_ptr,
    ax_ptr,
    b_ptr,
    alpha_ptr,
    rr_ptr,
    state_ptr,
    threshold_ptr,
    limit_ptr,
    maxiter: tl.int64,
    rr_out_ptr,
    state_out_ptr,
    residual_sq_ptr,
    ld16,
    P,
    MAX_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    batch = tl.num_programs(0) // P
    b = (pid // P).to(tl.int64)

    seen = tl.load(state_ptr + b)
    iterations = tl.load(state_ptr + batch + b)
    rr = fold(rr_ptr + b * P, P, MAX_P)
    runs = seen < 0
    code = _next_code(rr, iterations, tl.load(threshold_ptr + b), tl.load(limit_ptr + b), maxiter)
    code = tl.where(runs, code, seen)
    if pid % P == 0:
        tl.store(state_out_ptr + b, code)
        tl.store(state_out_ptr + batch + b, iterations + (code < 0).to(tl.int32))
        tl.store(residual_sq_ptr + b, rr, mask=runs)

    squares = tl.zeros([BLOCK], tl.float64)
    if code < 0:
        dtype = x_ptr.dtype.element_ty
        alpha = tl.load(alpha_ptr + b).to(dtype)
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        x_ptr += b * ld
        b_ptr += b * ld
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        for s in range(start, whole, BLOCK):
            ax = read_block(ax_ptr, b, ld, s, dtype, BLOCK)
            squares += _update_block(x_ptr, ax, b_ptr, alpha, s + lanes, None, None)
        if whole < end:
            tail = whole + lanes
            ax = read_tail(ax_ptr, b, ld, whole, dtype, BLOCK)
            squares += _update_block(x_ptr, ax, b_ptr, alpha, tail, tail < end, 0.0)
    tl.store(rr_out_ptr + pid, tl.sum(squares, axis=0))


def neumann_step(
    x: Tensor,
    ax: Tensor,
    b: Tensor,
    alpha: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    rr_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Advance each running system by one iteration, or stop it."""
    launch(
        _neumann_step_kernel,
        x,
        rr_out,
        x,
        ax,
        b,
        alpha,
        rr,
        state,
        threshold,
        limit,
        maxiter,
        rr_out,
        state_out,
        residual_sq,
    )
