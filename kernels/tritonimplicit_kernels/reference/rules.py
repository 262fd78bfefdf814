"""What a step decides for each of the B systems, before a vector is touched.

Nothing is read by the host here: it is all (B,) tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels import status


def decide_cg(
    dots: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Settle the state; return which systems advance (B,), and alpha and beta (B, 1) in `dtype`."""
    rr_b, (pap, apap) = rr.sum(-1), dots.sum(-1)  # (B,) each
    code = _cg_code(rr_b, pap, apap, state, threshold, maxiter, torch.finfo(dtype).eps)
    advances = _settle(code, rr_b, state, state_out, residual_sq)
    return advances, *cg_scales(rr_b, pap, apap, dtype)


def cg_scales(rr: Tensor, pap: Tensor, apap: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return alpha and beta (B, 1), computed in float64 and rounded once."""
    alpha = rr / pap
    beta = (alpha * alpha * apap - rr).clamp_min_(0).div_(rr)
    alpha, beta = torch.stack([alpha, beta]).to(dtype)[:, :, None]
    return alpha, beta


def decide_neumann(
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
) -> Tensor:
    """Settle the state; return which systems advance (B,)."""
    rr_b = rr.sum(-1)  # (B,)
    code = _neumann_code(rr_b, state, threshold, limit, maxiter)
    return _settle(code, rr_b, state, state_out, residual_sq)


def _cg_code(
    rr: Tensor,
    pap: Tensor,
    apap: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    eps: float,
) -> Tensor:
    """Say what each running system turns to; the last rule that holds wins."""
    seen, iterations = state
    size = pap.abs()
    code = status.RUNNING_POSITIVE - (pap <= 0).int()  # one less is RUNNING_NEGATIVE
    code.masked_fill_((seen != status.RUNNING) & (seen != code), status.INDEFINITE)
    code.masked_fill_(size <= rr.sqrt() * apap.sqrt() * eps, status.BREAKDOWN)
    code.masked_fill_(~((size < torch.inf) & (apap < torch.inf)), status.NON_FINITE)
    code.masked_fill_(iterations >= maxiter, status.MAX_ITERATIONS)
    code.masked_fill_(rr <= threshold, status.CONVERGED)
    return code.masked_fill_(~(rr < torch.inf), status.NON_FINITE)


def _neumann_code(
    rr: Tensor, state: Tensor, threshold: Tensor, limit: Tensor, maxiter: int
) -> Tensor:
    """Say what each running system turns to; the last rule that holds wins."""
    code = torch.full_like(state[0], status.RUNNING)
    code.masked_fill_(state[1] >= maxiter, status.MAX_ITERATIONS)
    code.masked_fill_(rr > limit, status.DIVERGED)
    code.masked_fill_(rr <= threshold, status.CONVERGED)
    return code.masked_fill_(~(rr < torch.inf), status.NON_FINITE)


def _settle(
    code: Tensor, rr: Tensor, state: Tensor, state_out: Tensor, residual_sq: Tensor
) -> Tensor:
    """Write what the systems have come to; frozen ones (`state[0]` >= 0) keep what they have."""
    seen, iterations = state
    runs = seen < 0
    torch.where(runs, rr, residual_sq, out=residual_sq)
    torch.where(runs, code, seen, out=state_out[0])
    advances = state_out[0] < 0
    torch.add(iterations, advances, out=state_out[1])
    return advances
