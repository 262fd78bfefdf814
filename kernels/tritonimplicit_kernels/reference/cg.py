"""Predict-and-recompute conjugate gradients (Chen and Carson 2020, doi 10.1137/19M1276856)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.reference.dots import dots as chunk_dots
from tritonimplicit_kernels.reference.dots import row_sums, squares
from tritonimplicit_kernels.reference.settle import settle
from tritonimplicit_kernels.reference.tiles import column_tiles, row_groups


def cg_dots(p: Tensor, ap: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write p.Ap and Ap.Ap of each running system into `dots`, and zero for a frozen one."""
    dots.zero_()
    for rows in row_groups((state[0] < 0).tolist(), p.shape[1]):
        tiles = column_tiles(p[rows], ap[rows])
        pap, apap = zip(*(_products(*tile) for tile in tiles), strict=True)
        dots[0, rows, 0] = row_sums(pap)
        dots[1, rows, 0] = row_sums(apap)


def _products(p: Tensor, ap: Tensor) -> tuple[Tensor, Tensor]:
    ap = ap.double()
    return chunk_dots(p.double(), ap), squares(ap)


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
    rr_b, (pap, apap) = rr.sum(-1), dots.sum(-1)  # (B,) each
    code = _next_code(rr_b, pap, apap, state, threshold, maxiter, torch.finfo(x.dtype).eps)
    advances = settle(code, rr_b, state, state_out, residual_sq)
    rr_out.zero_()
    if not any(advances):
        return
    alpha = rr_b / pap
    beta = (alpha * alpha * apap - rr_b).clamp_min_(0).div_(rr_b)
    alpha, beta = torch.stack([alpha, beta]).to(x.dtype)[:, :, None]  # (B, 1) each
    for rows in row_groups(advances, x.shape[1]):
        vectors = x[rows], r[rows], p[rows], ap[rows]
        tiles = column_tiles(*vectors)
        rr_out[rows, 0] = row_sums(_update(tile, alpha[rows], beta[rows]) for tile in tiles)
        if isinstance(rows, Tensor):
            x[rows], r[rows], p[rows] = vectors[:3]


def _update(tile: tuple[Tensor, ...], alpha: Tensor, beta: Tensor) -> Tensor:
    x, r, p, ap = tile
    # Products and sums apart: each is rounded once, whichever of torch's loops does it. A fused
    # addcmul may or may not be, so that a row's bits would depend on where it lies.
    scaled = p * alpha
    x += scaled
    r -= torch.mul(ap, alpha, out=scaled)
    p.mul_(beta).add_(r)
    return squares(r.double())


def _next_code(
    rr: Tensor,
    pap: Tensor,
    apap: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    eps: float,
) -> Tensor:
    """Say what each running system turns to; the last rule that holds wins."""
    seen, iterations = state
    size = pap.abs()
    code = status.RUNNING_POSITIVE - (pap <= 0).int()  # one less is RUNNING_NEGATIVE
    code.masked_fill_((seen != status.RUNNING) & (seen != code), status.INDEFINITE)
    code.masked_fill_(size <= rr.sqrt() * apap.sqrt() * eps, status.BREAKDOWN)
    code.masked_fill_(~((size < torch.inf) & (apap < torch.inf)), status.NON_FINITE)
    code.masked_fill_(iterations >= maxiter, status.MAX_ITERATIONS)
    code.masked_fill_(rr <= threshold, status.CONVERGED)
    return code.masked_fill_(~(rr < torch.inf), status.NON_FINITE)
