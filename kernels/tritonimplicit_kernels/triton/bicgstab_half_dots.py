"""Third launch of a BiCGSTAB iteration: t.s, t.t, r^.s and r^.t of t = A s, 3 passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.launch import launch
from tritonimplicit_kernels.triton.programs import chunk_bounds
from tritonimplicit_kernels.triton.vectors import read_block, read_tail


@triton.jit
def _load(shadow_ptr, s_ptr, offsets, mask, other):
    """Return a block of both in float64."""
    shadow = tl.load(shadow_ptr + offsets, mask=mask, other=other).to(tl.float64)
    return shadow, tl.load(s_ptr + offsets, mask=mask, other=other).to(tl.float64)


@triton.jit(do_not_specialize=["ld16", "P"])
def _bicgstab_half_dots_kernel(
    shadow_ptr,
    s_ptr,
    t_ptr,
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
    ts = tl.zeros([BLOCK], tl.float64)
    tt = tl.zeros([BLOCK], tl.float64)
    shadow_s = tl.zeros([BLOCK], tl.float64)
    shadow_t = tl.zeros([BLOCK], tl.float64)
    if tl.load(state_ptr + b) < 0:
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        shadow_ptr += b * ld
        s_ptr += b * ld
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        dtype = s_ptr.dtype.element_ty
        for i in range(start, whole, BLOCK):
            shadow, s = _load(shadow_ptr, s_ptr, i + lanes, None, None)
            t = read_block(t_ptr, b, ld, i, dtype, BLOCK).to(tl.float64)
            ts += t * s
            tt += t * t
            shadow_s += shadow * s
            shadow_t += shadow * t
        if whole < end:
            tail = whole + lanes
            shadow, s = _load(shadow_ptr, s_ptr, tail, tail < end, 0.0)
            t = read_tail(t_ptr, b, ld, whole, dtype, BLOCK).to(tl.float64)
            ts += t * s
            tt += t * t
            shadow_s += shadow * s
            shadow_t += shadow * t
    tl.store(dots_ptr + pid, tl.sum(ts, axis=0))
    tl.store(dots_ptr + programs + pid, tl.sum(tt, axis=0))
    tl.store(dots_ptr + 2 * programs + pid, tl.sum(shadow_s, axis=0))
    tl.store(dots_ptr + 3 * programs + pid, tl.sum(shadow_t, axis=0))


def bicgstab_half_dots(
    shadow: Tensor, s: Tensor, t: Tensor, state: Tensor, half_dots: Tensor
) -> None:
    """Write partial sums of t.s, t.t, r^.s and r^.t into `half_dots`, zero where frozen."""
    launch(_bicgstab_half_dots_kernel, s, half_dots, shadow, s, t, state, half_dots)
