"""Second launch of a CG iteration with M = diag(d): update x, r, p; recompute r.r, r.z: 8 passes.

Predict-and-recompute preconditioned conjugate gradients (Chen and Carson 2020, doi
10.1137/19M1276856).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.cg_rules import next_code
from tritonimplicit_kernels.triton.launch import launch
from tritonimplicit_kernels.triton.programs import chunk_bounds, fold
from tritonimplicit_kernels.triton.vectors import read_block, read_tail


@triton.jit
def _update_block(x_ptr, r_ptr, p_ptr, ap, d_ptr, alpha, beta, offsets, mask, other):
    """Update one block of x, r, p; return r^2 and d r^2 of the new r in float64."""
    p = tl.load(p_ptr + offsets, mask=mask, other=other)
    x = tl.load(x_ptr + offsets, mask=mask, other=other)
    d = tl.load(d_ptr + offsets, mask=mask, other=other)
    r = tl.load(r_ptr + offsets, mask=mask, other=other) - alpha * ap
    tl.store(x_ptr + offsets, x + alpha * p, mask=mask)
    tl.store(r_ptr + offsets, r, mask=mask)
    tl.store(p_ptr + offsets, d * r + beta * p, mask=mask)
    r64 = r.to(tl.float64)
    square = r64 * r64
    return square, d.to(tl.float64) * square


@triton.jit(do_not_specialize=["maxiter", "ld16", "P"])
def _pcg_step_kernel(
    x_ptr,
    r_ptr,
    p_ptr,
    ap_ptr,
    d_ptr,
    dots_ptr,
    rr_ptr,
    rz_ptr,
    state_ptr,
    threshold_ptr,
    maxiter: tl.int64,
    rr_out_ptr,
    rz_out_ptr,
    state_out_ptr,
    residual_sq_ptr,
    ld16,
    P,
    MAX_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    batch = programs // P
    b = (pid // P).to(tl.int64)
    dtype = x_ptr.dtype.element_ty

    seen = tl.load(state_ptr + b)
    iterations = tl.load(state_ptr + batch + b)
    rr = fold(rr_ptr + b * P, P, MAX_P)
    rz = fold(rz_ptr + b * P, P, MAX_P)
    pap = fold(dots_ptr + b * P, P, MAX_P)
    apmap = fold(dots_ptr + programs + b * P, P, MAX_P)
    threshold = tl.load(threshold_ptr + b)
    runs = seen < 0
    code = next_code(rr, rz, pap, apmap, seen, iterations, threshold, maxiter, dtype)
    code = tl.where(runs, code, seen)
    if pid % P == 0:
        tl.store(state_out_ptr + b, code)
        tl.store(state_out_ptr + batch + b, iterations + (code < 0).to(tl.int32))
        tl.store(residual_sq_ptr + b, rr, mask=runs)

    squares = tl.zeros([BLOCK], tl.float64)
    energies = tl.zeros([BLOCK], tl.float64)
    if code < 0:
        alpha = rz / pap
        beta = (tl.maximum(alpha * alpha * apmap - rz, 0.0) / rz).to(dtype)
        alpha = alpha.to(dtype)
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        x_ptr += b * ld
        r_ptr += b * ld
        p_ptr += b * ld
        d_ptr += b * ld
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        for s in range(start, whole, BLOCK):
            ap = read_block(ap_ptr, b, ld, s, dtype, BLOCK)
            square, energy = _update_block(
                x_ptr, r_ptr, p_ptr, ap, d_ptr, alpha, beta, s + lanes, None, None
            )
            squares += square
            energies += energy
        if whole < end:
            tail = whole + lanes
            ap = read_tail(ap_ptr, b, ld, whole, dtype, BLOCK)
            square, energy = _update_block(
                x_ptr, r_ptr, p_ptr, ap, d_ptr, alpha, beta, tail, tail < end, 0.0
            )
            squares += square
            energies += energy
    tl.store(rr_out_ptr + pid, tl.sum(squares, axis=0))
    tl.store(rz_out_ptr + pid, tl.sum(energies, axis=0))


def pcg_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    ap: Tensor,
    d: Tensor,
    dots: Tensor,
    rr: Tensor,
    rz: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    rr_out: Tensor,
    rz_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Advance each running system by one iteration, or stop it."""
    launch(
        _pcg_step_kernel,
        x,
        rr_out,
        x,
        r,
        p,
        ap,
        d,
        dots,
        rr,
        rz,
        state,
        threshold,
        maxiter,
        rr_out,
        rz_out,
        state_out,
        residual_sq,
    )
