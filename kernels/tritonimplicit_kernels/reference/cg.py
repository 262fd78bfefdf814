"""Predict-and-recompute conjugate gradients (Chen and Carson 2020, doi 10.1137/19M1276856)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels.reference import few, plain
from tritonimplicit_kernels.reference.dots import products, row_sums, scratch, squares, widen
from tritonimplicit_kernels.reference.rules import decide_cg
from tritonimplicit_kernels.reference.tiles import (
    column_tiles,
    put_back,
    row_groups,
    take,
    write_sums,
)


def cg_dots(p: Tensor, ap: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write p.Ap and Ap.Ap of each running system into `dots`, and zero for a frozen one."""
    if p.device.type != "cpu":
        return plain.cg_dots(p, ap, state, dots)
    dots.zero_()
    for rows in row_groups(p, few.running(state)):
        tiles = column_tiles(*take(rows, p, ap))
        write_sums(dots, rows, row_sums(_products(*tile) for tile in tiles))
    return None


def _products(p: Tensor, ap: Tensor) -> Tensor:
    room = scratch(p)
    p, ap = widen(p, room.first), widen(ap, room.second)
    return torch.stack([products(p, ap, room.first), squares(ap)])


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
    if x.device.type != "cpu":
        return plain.cg_step(
            *(x, r, p, ap, dots, rr, state, threshold),
            *(maxiter, rr_out, state_out, residual_sq),
        )
    decision = dots, rr, rr, state, threshold, maxiter, state_out, residual_sq, x.dtype
    rr_out.zero_()
    decide = few.decide_cg if few.are_few(state) else decide_cg
    advances, *scales = decide(*decision)
    ap = ap.to(x.dtype)
    for rows in row_groups(x, advances):
        vectors = take(rows, x, r, p, ap)
        alpha, beta = (scale[rows] if isinstance(scale, Tensor) else scale for scale in scales)
        tiles = column_tiles(*vectors)
        write_sums(rr_out, rows, row_sums(_update(tile, alpha, beta) for tile in tiles))
        put_back(rows, (x, r, p), vectors[:3])
    return None


def _update(tile: tuple[Tensor, ...], alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    x, r, p, ap = tile
    room = scratch(p)
    # Products and sums apart: each is rounded once, whichever of torch's loops does it. A fused
    # addcmul may or may not be, so that a row's bits would depend on where it lies.
    x += torch.mul(p, alpha, out=room.vectors)
    r -= torch.mul(ap, alpha, out=room.vectors)
    p.mul_(beta).add_(r)
    return squares(widen(r, room.first))
