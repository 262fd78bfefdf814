"""Second launch of a BiCGSTAB iteration: s = r - alpha v in the place of r, and s.s: 3 passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.bicgstab_rules import next_code, outweighs
from tritonimplicit_kernels.triton.launch import launch
from tritonimplicit_kernels.triton.programs import chunk_bounds, fold
from tritonimplicit_kernels.triton.vectors import read_block, read_tail


@triton.jit
def _update_block(r_ptr, v, alpha, offsets, mask, other):
    """Turn one block of r into s; return the squares of s in float64."""
    s = tl.load(r_ptr + offsets, mask=mask, other=other) - alpha * v
    tl.store(r_ptr + offsets, s, mask=mask)
    s64 = s.to(tl.float64)
    return s64 * s64


@triton.jit(do_not_specialize=["maxiter", "ld16", "P"])
def _bicgstab_half_step_kernel(
    r_ptr,
    v_ptr,
    dots_ptr,
    rho_ptr,
    rr_ptr,
    state_ptr,
    threshold_ptr,
    limit_ptr,
    maxiter: tl.int64,
    alpha_ptr,
    ss_ptr,
    state_out_ptr,
    residual_sq_ptr,
    ld16,
    P,
    MAX_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    batch = programs // P
    b = (pid // P).to(tl.int64)
    dtype = r_ptr.dtype.element_ty

    seen = tl.load(state_ptr + b)
    iterations = tl.load(state_ptr + batch + b)
    rr = fold(rr_ptr + b * P, P, MAX_P)
    along = fold(dots_ptr + b * P, P, MAX_P)
    shadow_sq = fold(dots_ptr + programs + b * P, P, MAX_P)
    vv = fold(dots_ptr + 2 * programs + b * P, P, MAX_P)
    rho = tl.load(rho_ptr + b)
    found = outweighs(along, shadow_sq, vv, dtype)
    threshold, limit = tl.load(threshold_ptr + b), tl.load(limit_ptr + b)
    runs = seen < 0
    fresh = rho == 0
    code = next_code(rr, vv, fresh & ~found, iterations, threshold, limit, maxiter)
    code = tl.where(runs, code, seen)
    # A fresh shadow residual is the residual.
    rho = tl.where(fresh, shadow_sq, rho)
    alpha = tl.where(found, rho / tl.where(found, along, 1.0), 0.0)
    if pid % P == 0:
        tl.store(state_out_ptr + b, code)
        tl.store(state_out_ptr + batch + b, iterations + (code < 0).to(tl.int32))
        tl.store(residual_sq_ptr + b, rr, mask=runs)
        tl.store(alpha_ptr + b, alpha, mask=code < 0)

    squares = tl.zeros([BLOCK], tl.float64)
    if code < 0:
        scale = alpha.to(dtype)
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        r_ptr += b * ld
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        for i in range(start, whole, BLOCK):
            v = read_block(v_ptr, b, ld, i, dtype, BLOCK)
            squares += _update_block(r_ptr, v, scale, i + lanes, None, None)
        if whole < end:
            tail = whole + lanes
            v = read_tail(v_ptr, b, ld, whole, dtype, BLOCK)
            squares += _update_block(r_ptr, v, scale, tail, tail < end, 0.0)
    tl.store(ss_ptr + pid, tl.sum(squares, axis=0))


def bicgstab_half_step(
    r: Tensor,
    v: Tensor,
    shadow_dots: Tensor,
    rho: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    alpha: Tensor,
    ss: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Turn r into s for each system that goes on, or stop it."""
    launch(
        _bicgstab_half_step_kernel,
        r,
        rr,
        r,
        v,
        shadow_dots,
        rho,
        rr,
        state,
        threshold,
        limit,
        maxiter,
        alpha,
        ss,
        state_out,
        residual_sq,
    )
