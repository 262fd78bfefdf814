"""What a CG step decides for a system, with a preconditioner or without."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonimplicit_kernels import status

_RUNNING = tl.constexpr(status.RUNNING)
_RUNNING_POSITIVE = tl.constexpr(status.RUNNING_POSITIVE)
_RUNNING_NEGATIVE = tl.constexpr(status.RUNNING_NEGATIVE)
_CONVERGED = tl.constexpr(status.CONVERGED)
_MAX_ITERATIONS = tl.constexpr(status.MAX_ITERATIONS)
_BREAKDOWN = tl.constexpr(status.BREAKDOWN)
_INDEFINITE = tl.constexpr(status.INDEFINITE)
_NON_FINITE = tl.constexpr(status.NON_FINITE)
_PRECONDITIONER = tl.constexpr(status.PRECONDITIONER)
_EPS_FP32 = tl.constexpr(2.0**-23)
_EPS_FP64 = tl.constexpr(2.0**-52)
_INF = tl.constexpr(float("inf"))


@triton.jit
def next_code(rr, rz, pap, apmap, seen, iterations, threshold, maxiter, dtype: tl.constexpr):
    """Say what a running system turns to; the last rule that holds wins.

    rz is r.M r and apmap Ap.M Ap: without a preconditioner M, r.r and Ap.Ap.
    """
    eps: tl.constexpr = _EPS_FP32 if dtype == tl.float32 else _EPS_FP64
    code = tl.where(pap > 0, _RUNNING_POSITIVE, _RUNNING_NEGATIVE)
    code = tl.where((seen != _RUNNING) & (seen != code), _INDEFINITE, code)
    # Where M is not definite, these may be negative: the rule after this one says so.
    sizes = tl.sqrt(tl.maximum(rz, 0.0)) * tl.sqrt(tl.maximum(apmap, 0.0))
    code = tl.where(tl.abs(pap) <= sizes * eps, _BREAKDOWN, code)
    code = tl.where((rz <= 0) | (apmap < 0), _PRECONDITIONER, code)
    finite = (tl.abs(pap) < _INF) & (tl.abs(apmap) < _INF) & (tl.abs(rz) < _INF)
    code = tl.where(finite, code, _NON_FINITE)
    code = tl.where(iterations >= maxiter, _MAX_ITERATIONS, code)
    code = tl.where(rr <= threshold, _CONVERGED, code)
    return tl.where(rr < _INF, code, _NON_FINITE)
