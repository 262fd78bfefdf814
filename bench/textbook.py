"""Conjugate gradients as a textbook writes them: the oracle in float64, a contender otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a.b of vectors (n,), or of each row of (B, n) as (B, 1)."""
    return a @ b if a.ndim == 1 else torch.linalg.vecdot(a, b)[:, None]


def cg_step(
    x: Tensor, r: Tensor, p: Tensor, ap: Tensor, rr: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One iteration without its matvec: x, r, p and r.r after it."""
    alpha = rr / dot(p, ap)
    x = x + alpha * p
    r = r - alpha * ap
    rr_new = dot(r, r)
    p = r + (rr_new / rr) * p
    return x, r, p, rr_new


def cg(matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """x after this many iterations from zero, for a vector (n,) or independent rows (B, n)."""
    x, r, p, rr = torch.zeros_like(b), b, b, dot(b, b)
    for _ in range(iterations):
        runs = rr > 0  # one that is solved exactly would go on with 0 / 0
        after = cg_step(x, r, p, matvec(p), rr)
        x, r, p, rr = (torch.where(runs, *pair) for pair in zip(after, (x, r, p, rr), strict=True))
    return x


def cg_to(rtol: float) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """A solver that stops where all of ‖r‖ <= rtol ‖b‖, by the recurrence; 10 n iterations."""

    def solve(matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        x, r, p, rr = torch.zeros_like(b), b, b, dot(b, b)
        enough = rtol**2 * rr
        for _ in range(10 * b.shape[-1]):
            runs = rr > enough
            if not runs.any():
                break
            after = cg_step(x, r, p, matvec(p), rr)
            pairs = zip(after, (x, r, p, rr), strict=True)
            x, r, p, rr = (torch.where(runs, *pair) for pair in pairs)
        return x

    return solve
