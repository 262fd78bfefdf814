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
    rz: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Settle the state; return which systems advance (B,), and alpha and beta (B, 1) in `dtype`.

    `dots` are p.Ap and Ap.M Ap, and `rz` is r.M r: without a preconditioner M, `rr` itself.
    """
    rr_b, (pap, apmap) = rr.sum(-1), dots.sum(-1)  # (B,) each
    rz_b = rr_b if rz is rr else rz.sum(-1)
    eps = torch.finfo(dtype).eps
    code = _cg_code(rr_b, rz_b, pap, apmap, state, threshold, maxiter, eps)
    advances = settle(code, rr_b, state, state_out, residual_sq)
    return advances, *cg_scales(rz_b, pap, apmap, dtype)


def cg_scales(rz: Tensor, pap: Tensor, apmap: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return alpha and beta (B, 1), computed in float64 and rounded once."""
    alpha = rz / pap
    beta = (alpha * alpha * apmap - rz).clamp_min_(0).div_(rz)
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
    return settle(code, rr_b, state, state_out, residual_sq)


def _cg_code(
    rr: Tensor,
    rz: Tensor,
    pap: Tensor,
    apmap: Tensor,
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
    code.masked_fill_(size <= rz.sqrt() * apmap.sqrt() * eps, status.BREAKDOWN)
    code.masked_fill_((rz <= 0) | (apmap < 0), status.PRECONDITIONER)
    finite = (size < torch.inf) & (apmap.abs() < torch.inf) & (rz.abs() < torch.inf)
    code.masked_fill_(~finite, status.NON_FINITE)
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


def settle(
    code: Tensor, rr: Tensor, state: Tensor, state_out: Tensor, residual_sq: Tensor
) -> Tensor:
    """Write what the systems have come to, and return which advance (B,).

    Frozen ones (`state[0]` >= 0) keep what they have.
    """
    seen, iterations = state
    runs = seen < 0
    torch.where(runs, rr, residual_sq, out=residual_sq)
    torch.where(runs, code, seen, out=state_out[0])
    advances = state_out[0] < 0
    torch.add(iterations, advances, out=state_out[1])
    return advances


def decide_arnoldi(
    size_sq: Tensor,
    singular: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
) -> Tensor:
    """Settle the state; return which systems advance (B,).

    `size_sq` (B,) is the squared norm of H's column, and `singular` says where H has no inverse.
    """
    code = torch.full_like(state[0], status.RUNNING)
    code.masked_fill_(singular, status.BREAKDOWN)
    code.masked_fill_(~(size_sq < torch.inf), status.NON_FINITE)
    code.masked_fill_(state[1] >= maxiter, status.MAX_ITERATIONS)
    code.masked_fill_(rr <= threshold, status.CONVERGED)
    code.masked_fill_(~(rr < torch.inf), status.NON_FINITE)
    return settle(code, rr, state, state_out, residual_sq)
