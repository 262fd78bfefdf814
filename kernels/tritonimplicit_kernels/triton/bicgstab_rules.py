"""What a BiCGSTAB iteration decides for a system, in its first half and in its second."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonimplicit_kernels.triton.constants import (
    BREAKDOWN,
    CONVERGED,
    DIVERGED,
    EPS_FP32,
    EPS_FP64,
    INF,
    MAX_ITERATIONS,
    NON_FINITE,
    RUNNING,
)


@triton.jit
def outweighs(dot, square, other_square, dtype: tl.constexpr):
    """Say whether a.b is more than rounding, given a.a and b.b; not where it is NaN."""
    eps: tl.constexpr = EPS_FP32 if dtype == tl.float32 else EPS_FP64
    return tl.abs(dot) > tl.sqrt(square) * tl.sqrt(other_square) * eps


@triton.jit
def next_code(rr, vv, lost, iterations, threshold, limit, maxiter):
    """Say what a running system turns to; the last rule that holds wins.

    `lost`: r^.A p is rounding, and would be with a new shadow residual too.
    """
    code = tl.where(lost, BREAKDOWN, RUNNING)
    code = tl.where(rr > limit, DIVERGED, code)
    code = tl.where(vv < INF, code, NON_FINITE)
    code = tl.where(iterations >= maxiter, MAX_ITERATIONS, code)
    code = tl.where(rr <= threshold, CONVERGED, code)
    return tl.where(rr < INF, code, NON_FINITE)


@triton.jit
def stabilising(ts, tt, ss, needed, dtype: tl.constexpr):
    """Return omega, rounded to the vectors' dtype.

    Zero where it is not needed, t.t underflows or t.s is rounding; NaN where t is not finite.
    """
    useful = needed & (tt > 0) & outweighs(ts, tt, ss, dtype)
    omega = tl.where(useful, ts / tl.where(useful, tt, 1.0), 0.0)
    omega = tl.where(needed & ~(tt < INF), float("nan"), omega)
    return omega.to(dtype)


@triton.jit
def next_rho(omega, alpha, along, shadow_s, shadow_t, shadow_sq, ss, dtype: tl.constexpr):
    """Return r^.r of the next iteration; zero where it has to begin afresh."""
    omega = omega.to(tl.float64)
    rho = shadow_s - omega * shadow_t
    # The product, which beta is divided by, may underflow.
    goes_on = (alpha != 0) & (along * omega != 0) & outweighs(rho, shadow_sq, ss, dtype)
    return tl.where(goes_on, rho, 0.0)
