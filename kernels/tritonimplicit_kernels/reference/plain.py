"""Every op on whole vectors, masked by `torch.where`: for devices other than the CPU.

Nothing is read by the host, whatever becomes of the systems. It is also the readable form of what
`cg`, `pcg`, `bicgstab` and `neumann` do a tile at a time, which have to write the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.bicgstab_rules import decide_half, decide_step
from tritonimplicit_kernels.reference.dots import row_dots, row_squares, row_weighted_squares
from tritonimplicit_kernels.reference.rules import decide_cg, decide_neumann


def cg_dots(p: Tensor, ap: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write p.Ap and Ap.Ap of each running system into `dots`, and zero for a frozen one."""
    _write_sums(dots, state[0] < 0, torch.stack([row_dots(p, ap), row_squares(ap)]))


def cg_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    ap: Tensor,
    dots: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    rr_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Advance each running system by one iteration, or stop it."""
    advances, alpha, beta = decide_cg(
        dots, rr, rr, state, threshold, maxiter, state_out, residual_sq, x.dtype
    )
    _write(x, advances, x + p * alpha)
    _write(r, advances, r - ap * alpha)
    _write(p, advances, r + p * beta)
    _write_sums(rr_out, advances, row_squares(r))


def pcg_dots(p: Tensor, ap: Tensor, d: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write p.Ap and Ap.(d Ap) of each running system into `dots`, and zero for a frozen one."""
    sums = torch.stack([row_dots(p, ap), row_weighted_squares(ap, d)])
    _write_sums(dots, state[0] < 0, sums)


def pcg_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    ap: Tensor,
    d: Tensor,
    dots: Tensor,
    rr: Tensor,
    rz: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    rr_out: Tensor,
    rz_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Advance each running system by one iteration, or stop it."""
    advances, alpha, beta = decide_cg(
        dots, rr, rz, state, threshold, maxiter, state_out, residual_sq, x.dtype
    )
    _write(x, advances, x + p * alpha)
    _write(r, advances, r - ap * alpha)
    _write(p, advances, d * r + p * beta)
    _write_sums(rr_out, advances, row_squares(r))
    _write_sums(rz_out, advances, row_weighted_squares(r, d))


def neumann_step(
    x: Tensor,
    ax: Tensor,
    b: Tensor,
    alpha: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    rr_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Advance each running system by one iteration, or stop it."""
    advances = decide_neumann(rr, state, threshold, limit, maxiter, state_out, residual_sq)
    residual = b - ax
    _write(x, advances, x + residual * alpha.to(x.dtype)[:, None])
    _write_sums(rr_out, advances, row_squares(residual))


def bicgstab_dots(shadow: Tensor, v: Tensor, state: Tensor, shadow_dots: Tensor) -> None:
    """Write r^.v, r^.r^ and v.v of each running system, and zero for a frozen one."""
    sums = row_dots(shadow, v), row_squares(shadow), row_squares(v)
    _write_sums(shadow_dots, state[0] < 0, torch.stack(sums))


def bicgstab_half_step(
    r: Tensor,
    v: Tensor,
    shadow_dots: Tensor,
    rho: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    alpha: Tensor,
    ss: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Turn r into s for each system that goes on, or stop it."""
    advances, scale = decide_half(
        *(shadow_dots, rho, rr, state, threshold, limit),
        *(maxiter, alpha, state_out, residual_sq, r.dtype),
    )
    _write(r, advances, r - v * scale)
    _write_sums(ss, advances, row_squares(r))


def bicgstab_half_dots(
    shadow: Tensor, s: Tensor, t: Tensor, state: Tensor, half_dots: Tensor
) -> None:
    """Write t.s, t.t, r^.s and r^.t of each running system, and zero for a frozen one."""
    sums = row_dots(t, s), row_squares(t), row_dots(shadow, s), row_dots(shadow, t)
    _write_sums(half_dots, state[0] < 0, torch.stack(sums))


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
    scalars = shadow_dots, ss, half_dots, alpha, unit, threshold, state, rho, rr_out
    pbicgstab_step(x, r, p, shadow, p, r, v, t, *scalars)


def pbicgstab_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    shadow: Tensor,
    y: Tensor,
    z: Tensor,
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
    """Finish the iteration of each running system, with y = M p and z = M s."""
    runs, fresh, scales = decide_step(
        shadow_dots, ss, half_dots, alpha, unit, threshold, state, rho, x.dtype
    )
    y_scale, z_scale, omega, beta = scales
    _write(x, runs, x + y * y_scale + z * z_scale)
    _write(r, runs, r - t * omega)
    _write(p, runs, torch.where(fresh[:, None], r, r + (p - v * omega) * beta))
    _write(shadow, fresh, r)
    _write_sums(rr_out, runs, row_squares(r) * unit * unit)


def _write(v: Tensor, rows: Tensor, value: Tensor) -> None:
    torch.where(rows[:, None], value, v, out=v)


def _write_sums(out: Tensor, rows: Tensor, sums: Tensor) -> None:
    out.zero_()
    out[..., 0] = torch.where(rows, sums, 0.0)
