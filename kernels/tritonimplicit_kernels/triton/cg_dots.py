"""First launch of a CG iteration: p.Ap and Ap.Ap, 2 passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.launch import launch
from tritonimplicit_kernels.triton.programs import chunk_bounds
from tritonimplicit_kernels.triton.vectors import read_block, read_tail


@triton.jit(do_not_specialize=["ld16", "P"])
def _cg_dots_kernel(
    p_ptr,
    ap_ptr,
    state_ptr,
    dots_ptr,
    ld16,
    P,
    MAX_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)
    pap = tl.zeros([BLOCK], tl.float64)
    apap = tl.zeros([BLOCK], tl.float64)
    if tl.load(state_ptr + b) < 0:
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        p_ptr += b * ld
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        dtype = p_ptr.dtype.element_ty
        for s in range(start, whole, BLOCK):
            p = tl.load(p_ptr + s + lanes).to(tl.float64)
            ap = read_block(ap_ptr, b, ld, s, dtype, BLOCK).to(tl.float64)
            pap += p * ap
            apap += ap * ap
        if whole < end:
            mask = whole + lanes < end
            p = tl.load(p_ptr + whole + lanes, mask=mask, other=0.0).to(tl.float64)
            ap = read_tail(ap_ptr, b, ld, whole, dtype, BLOCK).to(tl.float64)
            pap += p * ap
            apap += ap * ap
    tl.store(dots_ptr + pid, tl.sum(pap, axis=0))
    tl.store(dots_ptr + tl.num_programs(0) + pid, tl.sum(apap, axis=0))


def cg_dots(p: Tensor, ap: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write the partial sums of p.Ap and Ap.Ap into `dots`, zero for a frozen system."""
    launch(_cg_dots_kernel, p, dots, p, ap, state, dots)
