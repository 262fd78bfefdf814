"""The common case on a CPU, in few calls: every system runs on.

Where systems are small the four dozen torch calls of `rules` cost more than the vectors' work.
`rules` would decide the same: a test holds one against the other.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.reference.rules import cg_scales

_ONE_ITERATION: Final = torch.tensor([[0], [1]], dtype=torch.int32, device="cpu")


def all_advance_cg(
    dots: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor | float, Tensor | float] | None:
    """Settle the state, and return alpha and beta, floats or (B, 1), as `rules.decide_cg` does.

    None, and nothing written, unless every system advances, and none for the first time; and in a
    batch with the same sign of p.Ap.
    """
    decide = _one if state.shape[1] == 1 else _many
    scales = decide(dots, rr, state, threshold, maxiter, dtype)
    if scales is not None:
        torch.sum(rr, -1, out=residual_sq)
        torch.add(state, _ONE_ITERATION, out=state_out)
    return scales


def _one(
    dots: Tensor, rr: Tensor, state: Tensor, threshold: Tensor, maxiter: int, dtype: torch.dtype
) -> tuple[Tensor | float, Tensor | float] | None:
    """Decide for a single system, in Python's floats."""
    (seen,), (iterations,) = state.tolist()
    (residual,), ((pap,), (apap,)) = rr.sum(-1).tolist(), dots.sum(-1).tolist()
    (tolerance,) = threshold.tolist()
    eps = torch.finfo(dtype).eps
    advances = (
        seen == (status.RUNNING_POSITIVE if pap > 0 else status.RUNNING_NEGATIVE)
        and iterations < maxiter
        and tolerance < residual < math.inf
        and apap < math.inf
        and math.sqrt(residual) * math.sqrt(apap) * eps < abs(pap) < math.inf
    )
    if not advances:
        return None
    alpha = residual / pap
    return alpha, max(alpha * alpha * apap - residual, 0.0) / residual


def _many(
    dots: Tensor, rr: Tensor, state: Tensor, threshold: Tensor, maxiter: int, dtype: torch.dtype
) -> tuple[Tensor | float, Tensor | float] | None:
    """Decide for a batch, by the three comparisons that all of it has to pass."""
    if state.shape[1] == 0:
        return None
    (lowest, _), (highest, iterations) = state.amin(1).tolist(), state.amax(1).tolist()
    if not lowest == highest < status.RUNNING or iterations >= maxiter:
        return None
    rr_b, (pap, apap) = rr.sum(-1), dots.sum(-1)  # (B,) each
    size = pap if highest == status.RUNNING_POSITIVE else -pap
    advances = (
        (rr_b > threshold)
        & (size > rr_b.sqrt() * apap.sqrt() * torch.finfo(dtype).eps)
        & (rr_b + apap + size < torch.inf)
    )
    return cg_scales(rr_b, pap, apap, dtype) if all(advances.tolist()) else None
