"""The Neumann series as Richardson's iteration, x += alpha (b - A x)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.reference.dots import row_sums, squares
from tritonimplicit_kernels.reference.settle import settle
from tritonimplicit_kernels.reference.tiles import column_tiles, row_groups


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
    rr_b = rr.sum(-1)  # (B,)
    code = _next_code(rr_b, state, threshold, limit, maxiter)
    advances = settle(code, rr_b, state, state_out, residual_sq)
    rr_out.zero_()
    scale = alpha.to(x.dtype)[:, None]  # (B, 1)
    for rows in row_groups(advances, x.shape[1]):
        vectors = x[rows], ax[rows], b[rows]
        tiles = column_tiles(*vectors)
        rr_out[rows, 0] = row_sums(_update(tile, scale[rows]) for tile in tiles)
        if isinstance(rows, Tensor):
            x[rows] = vectors[0]


def _update(tile: tuple[Tensor, ...], alpha: Tensor) -> Tensor:
    x, ax, b = tile
    residual = b - ax
    rr = squares(residual.double())
    x += residual.mul_(alpha)  # apart from the sum, for the reason given in cg.py
    return rr


def _next_code(rr: Tensor, state: Tensor, threshold: Tensor, limit: Tensor, maxiter: int) -> Tensor:
    """Say what each running system turns to; the last rule that holds wins."""
    code = torch.full_like(state[0], status.RUNNING)
    code.masked_fill_(state[1] >= maxiter, status.MAX_ITERATIONS)
    code.masked_fill_(rr > limit, status.DIVERGED)
    code.masked_fill_(rr <= threshold, status.CONVERGED)
    return code.masked_fill_(~(rr < torch.inf), status.NON_FINITE)
