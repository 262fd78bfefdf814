"""First launch of a BiCGSTAB iteration: r^.v, r^.r^ and v.v of v = A p, 2 passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.launch import launch
from tritonimplicit_kernels.triton.programs import chunk_bounds
from tritonimplicit_kernels.triton.vectors import read_block, read_tail


@triton.jit(do_not_specialize=["ld16", "P"])
def _bicgstab_dots_kernel(
    shadow_ptr,
    v_ptr,
    state_ptr,
    dots_ptr,
    ld16,
    P,
    MAX_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    b = (pid // P).to(tl.int64)
    along = tl.zeros([BLOCK], tl.float64)
    shadow_sq = tl.zeros([BLOCK], tl.float64)
    vv = tl.zeros([BLOCK], tl.float64)
    if tl.load(state_ptr + b) < 0:
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        shadow_ptr += b * ld
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        dtype = shadow_ptr.dtype.element_ty
        for i in range(start, whole, BLOCK):
            shadow = tl.load(shadow_ptr + i + lanes).to(tl.float64)
            v = read_block(v_ptr, b, ld, i, dtype, BLOCK).to(tl.float64)
            along += shadow * v
            shadow_sq += shadow * shadow
            vv += v * v
        if whole < end:
            tail = whole + lanes
            shadow = tl.load(shadow_ptr + tail, mask=tail < end, other=0.0).to(tl.float64)
            v = read_tail(v_ptr, b, ld, whole, dtype, BLOCK).to(tl.float64)
            along += shadow * v
            shadow_sq += shadow * shadow
            vv += v * v
    tl.store(dots_ptr + pid, tl.sum(along, axis=0))
    tl.store(dots_ptr + programs + pid, tl.sum(shadow_sq, axis=0))
    tl.store(dots_ptr + 2 * programs + pid, tl.sum(vv, axis=0))


def bicgstab_dots(shadow: Tensor, v: Tensor, state: Tensor, shadow_dots: Tensor) -> None:
    """Write the partial sums of r^.v, r^.r^ and v.v into `shadow_dots`, zero where frozen."""
    launch(_bicgstab_dots_kernel, shadow, shadow_dots, shadow, v, state, shadow_dots)
