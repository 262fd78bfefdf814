"""The last launch of a BiCGSTAB iteration, with a preconditioner or without.

van der Vorst 1992 (doi 10.1137/0913035), with the next r^.r from r^.s and r^.t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonimplicit_kernels.triton.bicgstab_rules import next_rho, stabilising
from tritonimplicit_kernels.triton.programs import chunk_bounds, fold
from tritonimplicit_kernels.triton.vectors import read_block, read_tail


@triton.jit
def _update_block(
    x_ptr, r_ptr, p_ptr, shadow_ptr, y_ptr, z_ptr, v, t, scalars, offsets, mask, other
):
    """Update one block of x, r, p; return the squares of the new r in float64.

    y = M p and z = M s are p and s where there is no M. A fresh start is along r, its own shadow.
    """
    x_alpha, x_omega, omega, beta, fresh = scalars
    s = tl.load(r_ptr + offsets, mask=mask, other=other)
    p = tl.load(p_ptr + offsets, mask=mask, other=other)
    y, z = p, s
    if y_ptr is not None:
        y = tl.load(y_ptr + offsets, mask=mask, other=other)
        z = tl.load(z_ptr + offsets, mask=mask, other=other)
    x = tl.load(x_ptr + offsets, mask=mask, other=other)
    r = s - omega * t
    p = r + beta * (p - omega * v)
    tl.store(x_ptr + offsets, x + x_alpha * y + x_omega * z, mask=mask)
    tl.store(r_ptr + offsets, r, mask=mask)
    tl.store(p_ptr + offsets, tl.where(fresh, r, p), mask=mask)
    if fresh:
        tl.store(shadow_ptr + offsets, r, mask=mask)
    r64 = r.to(tl.float64)
    return r64 * r64


@triton.jit
def step(
    x_ptr,
    r_ptr,
    p_ptr,
    shadow_ptr,
    y_ptr,
    z_ptr,
    v_ptr,
    t_ptr,
    shadow_dots_ptr,
    ss_ptr,
    half_dots_ptr,
    alpha_ptr,
    unit_ptr,
    threshold_ptr,
    state_ptr,
    rho_ptr,
    rr_out_ptr,
    ld16,
    P,
    MAX_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do what a program of the launch does; y_ptr and z_ptr are None where there is no M."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    b = (pid // P).to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    unit = tl.load(unit_ptr + b)

    squares = tl.zeros([BLOCK], tl.float64)
    if tl.load(state_ptr + b) < 0:
        along = fold(shadow_dots_ptr + b * P, P, MAX_P)
        shadow_sq = fold(shadow_dots_ptr + programs + b * P, P, MAX_P)
        ts = fold(half_dots_ptr + b * P, P, MAX_P)
        tt = fold(half_dots_ptr + programs + b * P, P, MAX_P)
        ss = fold(ss_ptr + b * P, P, MAX_P)
        shadow_s = fold(half_dots_ptr + 2 * programs + b * P, P, MAX_P)
        shadow_t = fold(half_dots_ptr + 3 * programs + b * P, P, MAX_P)
        alpha = tl.load(alpha_ptr + b)
        needed = ss * unit * unit > tl.load(threshold_ptr + b)
        omega = stabilising(ts, tt, ss, needed, dtype)
        rho = next_rho(omega, alpha, along, shadow_s, shadow_t, shadow_sq, ss, dtype)
        fresh = rho == 0
        omega64 = omega.to(tl.float64)
        beta = (rho / tl.where(fresh, 1.0, along * omega64)).to(dtype)
        scalars = (alpha * unit).to(dtype), (omega64 * unit).to(dtype), omega, beta, fresh
        if pid % P == 0:
            tl.store(rho_ptr + b, rho)
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        x_ptr += b * ld
        r_ptr += b * ld
        p_ptr += b * ld
        shadow_ptr += b * ld
        if y_ptr is not None:
            y_ptr += b * ld
            z_ptr += b * ld
        vectors = x_ptr, r_ptr, p_ptr, shadow_ptr, y_ptr, z_ptr
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        for i in range(start, whole, BLOCK):
            v = read_block(v_ptr, b, ld, i, dtype, BLOCK)
            t = read_block(t_ptr, b, ld, i, dtype, BLOCK)
            squares += _update_block(*vectors, v, t, scalars, i + lanes, None, None)
        if whole < end:
            tail = whole + lanes
            v = read_tail(v_ptr, b, ld, whole, dtype, BLOCK)
            t = read_tail(t_ptr, b, ld, whole, dtype, BLOCK)
            squares += _update_block(*vectors, v, t, scalars, tail, tail < end, 0.0)
    tl.store(rr_out_ptr + pid, tl.sum(squares, axis=0) * unit * unit)
