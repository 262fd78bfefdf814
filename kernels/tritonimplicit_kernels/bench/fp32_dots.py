"""The dots of a CG iteration in float32, of scaled vectors: what float64's cost is held against."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.launch import launch
from tritonimplicit_kernels.triton.programs import chunk_bounds


@triton.jit(do_not_specialize=["ld16", "P"])
def _fp32_dots_kernel(
    p_ptr,
    ap_ptr,
    scales_ptr,
    dots_ptr,
    ld16,
    P,
    MAX_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)
    batch = tl.num_programs(0) // P
    p_scale = tl.load(scales_ptr + b)
    ap_scale = tl.load(scales_ptr + batch + b)
    pap = tl.zeros([BLOCK], tl.float32)
    apap = tl.zeros([BLOCK], tl.float32)
    ld = ld16.to(tl.int64) * 16
    start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
    p_ptr += b * ld
    ap_ptr += b * ld
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    for s in range(start, whole, BLOCK):
        p = tl.load(p_ptr + s + lanes) * p_scale
        ap = tl.load(ap_ptr + s + lanes) * ap_scale
        pap += p * ap
        apap += ap * ap
    if whole < end:
        mask = whole + lanes < end
        p = tl.load(p_ptr + whole + lanes, mask=mask, other=0.0) * p_scale
        ap = tl.load(ap_ptr + whole + lanes, mask=mask, other=0.0) * ap_scale
        pap += p * ap
        apap += ap * ap
    p64, ap64 = 1 / p_scale.to(tl.float64), 1 / ap_scale.to(tl.float64)
    tl.store(dots_ptr + pid, tl.sum(pap, axis=0).to(tl.float64) * p64 * ap64)
    tl.store(dots_ptr + tl.num_programs(0) + pid, tl.sum(apap, axis=0).to(tl.float64) * ap64 * ap64)


def fp32_dots(p: Tensor, ap: Tensor, scales: Tensor, dots: Tensor) -> None:
    """Do `cg_dots` on float32 vectors of running systems, but multiply and add in float32.

    scales: (2, B) float32, powers of two that bring the sizes of p and ap near 1.
    """
    launch(_fp32_dots_kernel, p, dots, p, ap, scales, dots)
