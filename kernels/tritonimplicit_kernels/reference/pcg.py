"""Diagonally preconditioned CG, predict and recompute (Chen and Carson 2020, as in `cg`)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels.reference import few, plain
from tritonimplicit_kernels.reference.dots import (
    products,
    row_sums,
    scratch,
    squares,
    weighted_squares,
    widen,
)
from tritonimplicit_kernels.reference.rules import decide_cg
from tritonimplicit_kernels.reference.tiles import (
    column_tiles,
    put_back,
    row_groups,
    take,
    write_sums,
)


def pcg_dots(p: Tensor, ap: Tensor, d: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write p.Ap and Ap.(d Ap) of each running system into `dots`, and zero for a frozen one."""
    if p.device.type != "cpu":
        return plain.pcg_dots(p, ap, d, state, dots)
    dots.zero_()
    for rows in row_groups(p, few.running(state)):
        tiles = column_tiles(*take(rows, p, ap, d))
        write_sums(dots, rows, row_sums(_products(*tile) for tile in tiles))
    return None


def _products(p: Tensor, ap: Tensor, d: Tensor) -> Tensor:
    room = scratch(p)
    p, ap = widen(p, room.first), widen(ap, room.second)
    return torch.stack([products(p, ap, room.first), weighted_squares(ap, d, room)])


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
    if x.device.type != "cpu":
        return plain.pcg_step(
            *(x, r, p, ap, d, dots, rr, rz, state, threshold),
            *(maxiter, rr_out, rz_out, state_out, residual_sq),
        )
    decision = dots, rr, rz, state, threshold, maxiter, state_out, residual_sq, x.dtype
    rr_out.zero_()
    rz_out.zero_()
    decide = few.decide_cg if few.are_few(state) else decide_cg
    advances, *scales = decide(*decision)
    ap = ap.to(x.dtype)
    for rows in row_groups(x, advances):
        vectors = take(rows, x, r, p, ap, d)
        alpha, beta = (scale[rows] if isinstance(scale, Tensor) else scale for scale in scales)
        tiles = [_update(tile, alpha, beta) for tile in column_tiles(*vectors)]
        for out, sums in zip((rr_out, rz_out), zip(*tiles, strict=True), strict=True):
            write_sums(out, rows, row_sums(sums))
        put_back(rows, (x, r, p), vectors[:3])
    return None


def _update(
    tile: tuple[Tensor, ...], alpha: Tensor | float, beta: Tensor | float
) -> tuple[Tensor, Tensor]:
    x, r, p, ap, d = tile
    room = scratch(p)
    scaled = room.vectors  # apart from the sums, as in cg.py
    x += torch.mul(p, alpha, out=scaled)
    r -= torch.mul(ap, alpha, out=scaled)
    p.mul_(beta).add_(torch.mul(d, r, out=scaled))
    r = widen(r, room.second)
    return squares(r), weighted_squares(r, d, room)
