"""Last launch of a BiCGSTAB iteration: omega and beta; x, r and p: 8 passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.bicgstab_update import step
from tritonimplicit_kernels.triton.launch import launch


@triton.jit(do_not_specialize=["ld16", "P"])
def _bicgstab_step_kernel(
    x_ptr,
    r_ptr,
    p_ptr,
    shadow_ptr,
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
    step(
        *(x_ptr, r_ptr, p_ptr, shadow_ptr, None, None, v_ptr, t_ptr),
        *(shadow_dots_ptr, ss_ptr, half_dots_ptr, alpha_ptr, unit_ptr),
        *(threshold_ptr, state_ptr, rho_ptr, rr_out_ptr, ld16, P, MAX_P, BLOCK),
    )


def bicgstab_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    shadow: Tensor,
    v: Tensor,
    t: Tensor,
    shadow_dots: Tensor,
    ss: Tensor,
    half_dots: Tensor,
    alpha: Tensor,
    unit: Tensor,
    threshold: Tensor,
    state: Tensor,
    rho: Tensor,
    rr_out: Tensor,
) -> None:
    """Finish the iteration of each running system."""
    launch(
        _bicgstab_step_kernel,
        x,
        rr_out,
        x,
        r,
        p,
        shadow,
        v,
        t,
        shadow_dots,
        ss,
        half_dots,
        alpha,
        unit,
        threshold,
        state,
        rho,
        rr_out,
    )
