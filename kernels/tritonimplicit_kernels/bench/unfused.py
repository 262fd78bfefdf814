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
    return x + _per_row(alpha, x) * residual, dot(residual, residual)


def bicgstab_dots(shadow: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return r^.v, r^.r^ and v.v."""
    return (torch.stack([dot(shadow, v), dot(shadow, shadow), dot(v, v)]),)


def bicgstab_half_step(
    r: Tensor, v: Tensor, shadow_dots: Tensor, rho: Tensor
) -> tuple[Tensor, ...]:
    """Return s, alpha and s.s after the first half of an iteration whose dots are known."""
    alpha = _per_row(rho, r) / shadow_dots[0]
    s = r - alpha * v
    return s, alpha, dot(s, s)


def bicgstab_half_dots(shadow: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Return t.s, t.t, r^.s and r^.t."""
    return (torch.stack([dot(t, s), dot(t, t), dot(shadow, s), dot(shadow, t)]),)


def bicgstab_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    v: Tensor,
    t: Tensor,
    shadow_dots: Tensor,
    half_dots: Tensor,
    alpha: Tensor,
) -> tuple[Tensor, ...]:
    """Return x, r, p, rho and r.r after the second half of an iteration, r being s before."""
    return pbicgstab_step(x, r, p, p, r, v, t, shadow_dots, half_dots, alpha)


def pbicgstab_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    y: Tensor,
    z: Tensor,
    v: Tensor,
    t: Tensor,
    shadow_dots: Tensor,
    half_dots: Tensor,
    alpha: Tensor,
) -> tuple[Tensor, ...]:
    """Return the same with a preconditioner, y = M p and z = M s."""
    ts, tt, shadow_s, shadow_t = half_dots
    omega = ts / tt
    rho = shadow_s - omega * shadow_t
    beta = rho / (shadow_dots[0] * omega)
    x = x + _per_row(alpha, x) * y + omega * z
    r = r - omega * t
    p = r + beta * (p - omega * v)
    return x, r, p, rho, dot(r, r)


def bicgstab(
    x: Tensor, r: Tensor, p: Tensor, shadow: Tensor, v: Tensor, t: Tensor, rho: Tensor
) -> tuple[Tensor, ...]:
    """Return x, r, p, rho and r.r after an iteration as van der Vorst has it."""
    rho = _per_row(rho, r)
    alpha = rho / dot(shadow, v)
    s = r - alpha * v
    omega = dot(t, s) / dot(t, t)
    x = x + alpha * p + omega * s
    r = s - omega * t
    rho_new = dot(shadow, r)
    p = r + (rho_new / rho) * (alpha / omega) * (p - omega * v)
    return x, r, p, rho_new, dot(r, r)


def dense_cg(a: Tensor, rhs: Tensor) -> tuple[Tensor, ...]:
    """Return the solution of a positive definite system."""
    return (torch.cholesky_solve(rhs[..., None], torch.linalg.cholesky(a))[..., 0],)


def _per_row(scalars: Tensor, rows: Tensor) -> Tensor:
    """Return scalars (B,) as (B, 1) beside rows (B, n)."""
    return scalars if rows.ndim == 1 else scalars[:, None]
