"""The ops' work in plain torch, a line a step: the oracle in float64, a contender otherwise.

Vectors are (n,) for one system, or (B, n) with scalars (B, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return a.b of vectors (n,), or of each row of (B, n) as (B, 1)."""
    return a @ b if a.ndim == 1 else torch.linalg.vecdot(a, b)[:, None]


def cg_dots(p: Tensor, ap: Tensor) -> tuple[Tensor, ...]:
    """Return p.Ap and Ap.Ap."""
    return (torch.stack([dot(p, ap), dot(ap, ap)]),)


def cg_step(
    x: Tensor, r: Tensor, p: Tensor, ap: Tensor, dots: Tensor, rr: Tensor
) -> tuple[Tensor, ...]:
    """Return x, r, p and r.r after an iteration whose dots are known."""
    pap, apap = dots
    alpha = rr / pap
    beta = (alpha * alpha * apap - rr) / rr
    x = x + alpha * p
    r = r - alpha * ap
    p = r + beta * p
    return x, r, p, dot(r, r)


def cg(
    x: Tensor, r: Tensor, p: Tensor, ap: Tensor, rr: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, r, p and r.r after an iteration as a textbook has it (Hestenes and Stiefel)."""
    alpha = rr / dot(p, ap)
    x = x + alpha * p
    r = r - alpha * ap
    rr_new = dot(r, r)
    p = r + (rr_new / rr) * p
    return x, r, p, rr_new


def pcg_dots(p: Tensor, ap: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Return p.Ap and Ap.(d Ap)."""
    return (torch.stack([dot(p, ap), dot(ap, d * ap)]),)


def pcg_step(
    x: Tensor, r: Tensor, p: Tensor, ap: Tensor, d: Tensor, dots: Tensor, rz: Tensor
) -> tuple[Tensor, ...]:
    """Return x, r, p, r.r and r.z after an iteration whose dots are known."""
    pap, apmap = dots
    alpha = rz / pap
    beta = (alpha * alpha * apmap - rz) / rz
    x = x + alpha * p
    r = r - alpha * ap
    z = d * r
    p = z + beta * p
    return x, r, p, dot(r, r), dot(r, z)


def pcg(x: Tensor, r: Tensor, p: Tensor, ap: Tensor, d: Tensor, rz: Tensor) -> tuple[Tensor, ...]:
    """Return x, r, p, r.r and r.z after a preconditioned iteration as a textbook has it."""
    alpha = rz / dot(p, ap)
    x = x + alpha * p
    r = r - alpha * ap
    z = d * r
    rz_new = dot(r, z)
    p = z + (rz_new / rz) * p
    return x, r, p, dot(r, r), rz_new


def neumann_step(x: Tensor, ax: Tensor, b: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    """Return x and the squared residual norm after a Richardson iteration."""
    residual = b - ax
    return x + (alpha if x.ndim == 1 else alpha[:, None]) * residual, dot(residual, residual)
