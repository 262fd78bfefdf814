"""The Neumann series as Richardson's iteration, x += alpha (b - A x)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels.reference import few, plain
from tritonimplicit_kernels.reference.dots import row_sums, scratch, squares, widen
from tritonimplicit_kernels.reference.rules import decide_neumann
from tritonimplicit_kernels.reference.tiles import (
    column_tiles,
    put_back,
    row_groups,
    take,
    write_sums,
)


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
    if x.device.type != "cpu":
        return plain.neumann_step(
            *(x, ax, b, alpha, rr, state, threshold, limit),
            *(maxiter, rr_out, state_out, residual_sq),
        )
    decide = few.decide_neumann if few.are_few(state) else decide_neumann
    advances = decide(rr, state, threshold, limit, maxiter, state_out, residual_sq)
    rr_out.zero_()
    scale = alpha.to(x.dtype)[:, None]  # (B, 1)
    for rows in row_groups(x, advances):
        vectors = take(rows, x, ax, b)
        (alpha_rows,) = take(rows, scale)
        tiles = column_tiles(*vectors)
        write_sums(rr_out, rows, row_sums(_update(tile, alpha_rows) for tile in tiles))
        put_back(rows, (x,), vectors[:1])
    return None


def _update(tile: tuple[Tensor, ...], alpha: Tensor) -> Tensor:
    x, ax, b = tile
    room = scratch(x)
    residual = torch.sub(b, ax, out=room.vectors)
    rr = squares(widen(residual, room.second))
    x += residual.mul_(alpha)  # apart from the sum, for the reason given in cg.py
    return rr
