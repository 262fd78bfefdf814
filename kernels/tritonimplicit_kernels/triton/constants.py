"""Statuses and limits as kernels read them: Triton takes no plain global."""

from __future__ import annotations

import triton.language as tl

from tritonimplicit_kernels import status

RUNNING = tl.constexpr(status.RUNNING)
RUNNING_POSITIVE = tl.constexpr(status.RUNNING_POSITIVE)
RUNNING_NEGATIVE = tl.constexpr(status.RUNNING_NEGATIVE)
CONVERGED = tl.constexpr(status.CONVERGED)
MAX_ITERATIONS = tl.constexpr(status.MAX_ITERATIONS)
STAGNATED = tl.constexpr(status.STAGNATED)
BREAKDOWN = tl.constexpr(status.BREAKDOWN)
INDEFINITE = tl.constexpr(status.INDEFINITE)
DIVERGED = tl.constexpr(status.DIVERGED)
NON_FINITE = tl.constexpr(status.NON_FINITE)
PRECONDITIONER = tl.constexpr(status.PRECONDITIONER)
EPS_FP32 = tl.constexpr(2.0**-23)
EPS_FP64 = tl.constexpr(2.0**-52)
INF = tl.constexpr(float("inf"))
