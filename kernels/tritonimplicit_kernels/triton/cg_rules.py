"""What a CG step decides for a system, with a preconditioner or without."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonimplicit_kernels.triton.constants import (
    BREAKDOWN,
    CONVERGED,
    EPS_FP32,
    EPS_FP64,
    INDEFINITE,
    INF,
    MAX_ITERATIONS,
    NON_FINITE,
    PRECONDITIONER,
    RUNNING,
    RUNNING_NEGATIVE,
    RUNNING_POSITIVE,
)


@triton.jit
def next_code(rr, rz, pap, apmap, seen, iterations, threshold, maxiter, dtype: tl.constexpr):
    """Say what a running system turns to; the last rule that holds wins.

    rz is r.M r and apmap Ap.M Ap: without a preconditioner M, r.r and Ap.Ap.
    """
    eps: tl.constexpr = EPS_FP32 if dtype == tl.float32 else EPS_FP64
    code = tl.where(pap > 0, RUNNING_POSITIVE, RUNNING_NEGATIVE)
    code = tl.where((seen != RUNNING) & (seen != code), INDEFINITE, code)
    # Where M is not definite, these may be negative: the rule after this one says so.
    sizes = tl.sqrt(tl.maximum(rz, 0.0)) * tl.sqrt(tl.maximum(apmap, 0.0))
    code = tl.where(tl.abs(pap) <= sizes * eps, BREAKDOWN, code)
    code = tl.where((rz <= 0) | (apmap < 0), PRECONDITIONER, code)
    finite = (tl.abs(pap) < INF) & (tl.abs(apmap) < INF) & (tl.abs(rz) < INF)
    code = tl.where(finite, code, NON_FINITE)
    code = tl.where(iterations >= maxiter, MAX_ITERATIONS, code)
    code = tl.where(rr <= threshold, CONVERGED, code)
    return tl.where(rr < INF, code, NON_FINITE)
