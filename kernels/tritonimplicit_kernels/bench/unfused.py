"""The ops' work in plain torch, a line a step: the oracle in float64, a contender otherwise.

Vectors are (n,) for one system, or (B, n) with scalars (B, 1). What becomes part of a basis or a
history, (K, n) or (K, B, n), is written there; nothing else that is given changes.
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


def cg_in_half(
    x: Tensor, r: Tensor, p: Tensor, ap: Tensor, rr: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same of a product in half precision."""
    return cg(x, r, p, ap.to(p.dtype), rr)


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


def dots(basis: Tensor, v: Tensor) -> Tensor:
    """Return basis[j].v as (k,), or (k, B)."""
    if v.ndim == 1:
        return basis @ v
    return torch.bmm(v[:, None], basis.permute(1, 2, 0))[:, 0].T


def combination(c: Tensor, basis: Tensor) -> Tensor:
    """Return the sum of c[j] basis[j], c being (k,) or (k, B)."""
    if c.ndim == 1:
        return c @ basis
    return torch.bmm(c.T[:, None], basis.transpose(0, 1))[:, 0]


def multi_dot(w: Tensor, basis: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return basis[j].w."""
    return (dots(basis[:count], w),)


def arnoldi_project(w: Tensor, basis: Tensor, count: int, first: Tensor) -> tuple[Tensor, ...]:
    """Return w less its part in the basis, and that rest's dots with the basis and itself."""
    vectors = basis[:count]
    w = w - combination(first[..., 0], vectors)
    return w, dots(vectors, w), dot(w, w)


def arnoldi_step(
    w_out: Tensor,
    basis: Tensor,
    count: int,
    first: Tensor,
    second: Tensor,
    left: Tensor,
    norm: Tensor,
) -> tuple[Tensor, ...]:
    """Return the next basis vector, H's column, Ayachour's next g and the squared residual norm."""
    more = second[..., 0]
    w = w_out - combination(more, basis[:count])
    entry = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    torch.div(w, entry, out=basis[count])
    h, g = (first[..., 0] + more).movedim(0, -1), left[..., :count]
    growth = -(g * h).sum(-1, keepdim=True) / entry
    scale = g.square().sum(-1, keepdim=True) + growth.square()
    return basis[count], torch.cat([h, entry], -1), growth, _per_row(norm, w).square() / scale


def arnoldi(w: Tensor, basis: Tensor, count: int, left: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
    """Return the same after classical Gram-Schmidt, twice."""
    (first,) = multi_dot(w, basis, count)
    w, second, _ = arnoldi_project(w, basis, count, first[..., None])
    return arnoldi_step(w, basis, count, first[..., None], second[..., None], left, norm)


def anderson_dots(
    image: Tensor,
    z: Tensor,
    z_before: Tensor,
    residual: Tensor,
    residuals: Tensor,
    moves: Tensor,
    slot: int,
    beta: float,
) -> tuple[Tensor, ...]:
    """Return the residual, what is remembered of the last step, its dots, and two squared norms."""
    now = image - z
    change = torch.sub(now, residual, out=residuals[slot])
    move = torch.add(z - z_before, change, alpha=beta, out=moves[slot])
    squares = torch.stack([dot(now, now), dot(image, image)])
    return now, change, move, dots(residuals, change), dots(residuals, now), squares


def anderson_mix(
    z: Tensor, residual: Tensor, moves: Tensor, coefficients: Tensor, beta: float
) -> tuple[Tensor, ...]:
    """Return the next iterate."""
    return (z + beta * residual - combination(coefficients.movedim(-1, 0), moves),)


def anderson(
    image: Tensor,
    z: Tensor,
    z_before: Tensor,
    residual: Tensor,
    residuals: Tensor,
    moves: Tensor,
    coefficients: Tensor,
    slot: int,
    beta: float,
) -> tuple[Tensor, ...]:
    """Return both, the least squares between them being solved."""
    found = anderson_dots(image, z, z_before, residual, residuals, moves, slot, beta)
    return *found, *anderson_mix(z, found[0], moves, coefficients, beta)


def dense_cg(a: Tensor, rhs: Tensor) -> tuple[Tensor, ...]:
    """Return the solution of a positive definite system."""
    return (torch.cholesky_solve(rhs[..., None], torch.linalg.cholesky(a))[..., 0],)


def _per_row(scalars: Tensor, rows: Tensor) -> Tensor:
    """Return scalars (B,) as (B, 1) beside rows (B, n)."""
    return scalars if rows.ndim == 1 else scalars[:, None]
