"""Conjugate gradients for small dense matrices: a whole solve in one launch, one program a system.

The matrix is read once and stays in the program's registers. The recurrence is that of `cg_step`.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.cg_rules import next_code
from tritonimplicit_kernels.triton.constants import (
    BREAKDOWN,
    CONVERGED,
    EPS_FP32,
    EPS_FP64,
    INF,
    NON_FINITE,
    RUNNING,
    STAGNATED,
)
from tritonimplicit_kernels.triton.start import start

# Of the matrix a thread keeps, in words of 8 bytes: no kernel spills, and two programs fit a core.
_WORDS: Final = 32
_SMALLEST_BLOCK: Final = 16


@triton.jit
def _dot(u, v):
    """Multiply and add in float64."""
    return tl.sum(u.to(tl.float64) * v.to(tl.float64), axis=0)


@triton.jit(do_not_specialize=["maxiter", "n"])
def _dense_cg_kernel(
    a_ptr,
    rhs_ptr,
    threshold_ptr,
    maxiter: tl.int64,
    solution_ptr,
    state_ptr,
    residual_sq_ptr,
    n,
    N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    dtype = a_ptr.dtype.element_ty
    eps: tl.constexpr = EPS_FP32 if dtype == tl.float32 else EPS_FP64
    lanes = tl.arange(0, N)
    inside = lanes < n
    elements = lanes[:, None] * n + lanes[None, :]
    a = tl.load(a_ptr + b * n * n + elements, mask=inside[:, None] & inside[None, :], other=0.0)
    rhs = tl.load(rhs_ptr + b * n + lanes, mask=inside, other=0.0)

    # In units of the largest element: products with A stay small.
    unit = tl.max(tl.abs(rhs), axis=0)
    unit = tl.where(unit == 0, 1.0, unit).to(dtype)
    r = rhs / unit
    x = tl.zeros([N], dtype)
    p = r
    rr = _dot(r, r)
    unit64 = unit.to(tl.float64)
    threshold = tl.load(threshold_ptr + b) / (unit64 * unit64)
    threshold = tl.maximum(threshold, rr * (eps * eps))
    code = RUNNING
    iterations = 0
    while code < 0:
        ap = tl.sum(a * p[:, None], axis=0)
        pap = _dot(p, ap)
        apap = _dot(ap, ap)
        code = next_code(rr, rr, pap, apap, code, iterations, threshold, maxiter, dtype)
        if code < 0:
            alpha = rr / pap
            beta = (tl.maximum(alpha * alpha * apap - rr, 0.0) / rr).to(dtype)
            x += alpha.to(dtype) * p
            r -= alpha.to(dtype) * ap
            p = r + beta * p
            rr = _dot(r, r)
            iterations += 1

    residual = (rhs / unit).to(tl.float64)
    residual -= tl.sum(a.to(tl.float64) * x.to(tl.float64)[:, None], axis=0)
    rr = tl.sum(residual * residual, axis=0)
    code = tl.where((code == CONVERGED) & (rr > threshold), STAGNATED, code)
    x *= unit
    largest = tl.max(tl.abs(x), axis=0)
    judged = code < BREAKDOWN
    finite = (rr < INF) & (largest < INF)
    code = tl.where(judged & ~finite, NON_FINITE, code)
    x = tl.where(code == NON_FINITE, float("nan"), x)
    tl.store(solution_ptr + b * n + lanes, x, mask=inside)
    tl.store(state_ptr + b, code)
    tl.store(state_ptr + tl.num_programs(0) + b, iterations)
    tl.store(residual_sq_ptr + b, rr * unit64 * unit64)


def dense_cg(
    a: Tensor,
    rhs: Tensor,
    threshold: Tensor,
    maxiter: int,
    solution: Tensor,
    state: Tensor,
    residual_sq: Tensor,
) -> None:
    """Solve each system, and judge it by its true residual."""
    batch, n, _ = a.shape
    if batch == 0:
        return
    size = max(_SMALLEST_BLOCK, triton.next_power_of_2(n))
    words = size * size * a.element_size() // 8
    with torch.cuda.device_of(a):
        start(
            _dense_cg_kernel,
            a.get_device(),
            batch,
            (a, rhs, threshold, maxiter, solution, state, residual_sq, n),
            (size,),
            num_warps=max(1, words // (32 * _WORDS)),
            fp_fusion=True,  # the reference adds up in another order anyway
        )
