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
    rz: Tensor,
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
    scales = decide(dots, rr, rz, state, threshold, maxiter, dtype)
    if scales is not None:
        go_on(rr.sum(-1), state, state_out, residual_sq)
    return scales


def all_advance_neumann(
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
) -> bool:
    """Settle the state as `rules.decide_neumann` does, and return whether every system advances.

    Unless every one does, nothing is written.
    """
    if _common_state(state, maxiter) != status.RUNNING:
        return False
    rr_b = rr.sum(-1)  # (B,)
    if not all(((rr_b > threshold) & (rr_b <= limit) & (rr_b < torch.inf)).tolist()):
        return False
    go_on(rr_b, state, state_out, residual_sq)
    return True


def go_on(rr: Tensor, state: Tensor, state_out: Tensor, residual_sq: Tensor) -> None:
    """Settle the state of systems that all advance; `rr` is (B,)."""
    residual_sq.copy_(rr)
    torch.add(state, _ONE_ITERATION, out=state_out)


def _common_state(state: Tensor, maxiter: int) -> int | None:
    """Return what all systems are marked as, or None if they differ or one has had its limit."""
    if state.shape[1] == 0:
        return None
    (lowest, _), (highest, iterations) = state.amin(1).tolist(), state.amax(1).tolist()
    return int(lowest) if lowest == highest and iterations < maxiter else None


def _one(
    dots: Tensor,
    rr: Tensor,
    rz: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    dtype: torch.dtype,
) -> tuple[Tensor | float, Tensor | float] | None:
    """Decide for a single system, in Python's floats."""
    (seen,), (iterations,) = state.tolist()
    (residual,), ((pap,), (apmap,)) = rr.sum(-1).tolist(), dots.sum(-1).tolist()
    (energy,) = (residual,) if rz is rr else rz.sum(-1).tolist()
    (tolerance,) = threshold.tolist()
    eps = torch.finfo(dtype).eps
    advances = (
        seen == (status.RUNNING_POSITIVE if pap > 0 else status.RUNNING_NEGATIVE)
        and iterations < maxiter
        and tolerance < residual < math.inf
        and 0 < energy < math.inf
        and 0 <= apmap < math.inf
        and math.sqrt(energy) * math.sqrt(apmap) * eps < abs(pap) < math.inf
    )
    if not advances:
        return None
    alpha = energy / pap
    return alpha, max(alpha * alpha * apmap - energy, 0.0) / energy


def _many(
    dots: Tensor,
    rr: Tensor,
    rz: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    dtype: torch.dtype,
) -> tuple[Tensor | float, Tensor | float] | None:
    """Decide for a batch, by the three comparisons that all of it has to pass."""
    seen = _common_state(state, maxiter)
    if seen not in (status.RUNNING_POSITIVE, status.RUNNING_NEGATIVE):
        return None
    rr_b, (pap, apmap) = rr.sum(-1), dots.sum(-1)  # (B,) each
    rz_b = rr_b if rz is rr else rz.sum(-1)
    size = pap if seen == status.RUNNING_POSITIVE else -pap
    advances = (
        (rr_b > threshold)
        & (size > rz_b.sqrt() * apmap.sqrt() * torch.finfo(dtype).eps)
        & (rr_b + apmap + size < torch.inf)
    )
    if rz is not rr:
        advances &= (rz_b > 0) & (rz_b < torch.inf)
    return cg_scales(rz_b, pap, apmap, dtype) if all(advances.tolist()) else None


def all_advance_arnoldi(
    size_sq: Tensor,
    grows: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
) -> bool:
    """Whether every system advances, by `rules.decide_arnoldi`, and `grows` (B,) as well.

    The state is settled if so, and else nothing written.
    """
    if _common_state(state, maxiter) != status.RUNNING:
        return False
    advances = grows & (rr > threshold) & (rr + size_sq < torch.inf)
    if not all(advances.tolist()):
        return False
    go_on(rr, state, state_out, residual_sq)
    return True
