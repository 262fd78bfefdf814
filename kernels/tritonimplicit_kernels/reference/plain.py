"""Every op on whole vectors, masked by `torch.where`: for devices other than the CPU.

Nothing is read by the host, whatever becomes of the systems. It is also the readable form of what
`cg`, `pcg` and `neumann` do a tile at a time, which have to write the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def _write(v: Tensor, rows: Tensor, value: Tensor) -> None:
    torch.where(rows[:, None], value, v, out=v)


def _write_sums(out: Tensor, rows: Tensor, sums: Tensor) -> None:
    out.zero_()
    out[..., 0] = torch.where(rows, sums, 0.0)
