"""What a BiCGSTAB iteration decides for each of the B systems, before a vector is touched.

Nothing is read by the host here: it is all (B,) tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.reference.rules import settle


def decide_half(
    shadow_dots: Tensor,
    rho: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    alpha_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Settle the state; return which systems advance (B,), and alpha (B, 1) in `dtype`.

    alpha is zero where r^.v is rounding: the iteration then does its second half alone.
    """
    rr_b, (along, shadow_sq, vv) = rr.sum(-1), shadow_dots.sum(-1)  # (B,) each
    found = _outweighs(along, shadow_sq, vv, dtype)
    fresh = rho == 0  # the shadow residual is the residual
    code = torch.full_like(state[0], status.RUNNING)
    code.masked_fill_(fresh & ~found, status.BREAKDOWN)
    code.masked_fill_(rr_b > limit, status.DIVERGED)
    code.masked_fill_(~(vv < torch.inf), status.NON_FINITE)
    code.masked_fill_(state[1] >= maxiter, status.MAX_ITERATIONS)
    code.masked_fill_(rr_b <= threshold, status.CONVERGED)
    code.masked_fill_(~(rr_b < torch.inf), status.NON_FINITE)
    advances = settle(code, rr_b, state, state_out, residual_sq)
    alpha = (torch.where(fresh, shadow_sq, rho) / along).masked_fill_(~found, 0.0)
    torch.where(advances, alpha, alpha_out, out=alpha_out)
    return advances, alpha.to(dtype)[:, None]


def decide_step(
    shadow_dots: Tensor,
    ss: Tensor,
    half_dots: Tensor,
    alpha: Tensor,
    unit: Tensor,
    threshold: Tensor,
    state: Tensor,
    rho: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Write the next rho; return which systems run and which begin afresh (B,), and four scalars.

    These are (B, 1) in `dtype`: x += first y + second z; r -= omega t; p = r + beta (p - omega v).
    omega is zero where s is small enough already, t.t underflows or t.s is rounding, and NaN where
    t is not finite.
    """
    along, shadow_sq, _ = shadow_dots.sum(-1)  # (B,) each
    ts, tt, shadow_s, shadow_t = half_dots.sum(-1)
    ss_b = ss.sum(-1)
    needed = ss_b * unit * unit > threshold
    useful = needed & (tt > 0) & _outweighs(ts, tt, ss_b, dtype)
    omega = (ts / tt).masked_fill_(~useful, 0.0)
    omega.masked_fill_(needed & ~(tt < torch.inf), torch.nan)
    omega = omega.to(dtype).double()
    next_rho = shadow_s - omega * shadow_t
    scale = along * omega  # may underflow
    goes_on = (alpha != 0) & (scale != 0) & _outweighs(next_rho, shadow_sq, ss_b, dtype)
    begins = ~goes_on
    beta = (next_rho / scale).masked_fill_(begins, 0.0)
    runs = state[0] < 0
    torch.where(runs, next_rho.masked_fill_(begins, 0.0), rho, out=rho)
    scales = torch.stack([alpha * unit, omega * unit, omega, beta]).to(dtype)[:, :, None]
    return runs, runs & begins, scales.unbind()


def _outweighs(dot: Tensor, square: Tensor, other_square: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a.b is more than rounding, given a.a and b.b; not where it is NaN."""
    return dot.abs() > square.sqrt() * other_square.sqrt() * torch.finfo(dtype).eps
