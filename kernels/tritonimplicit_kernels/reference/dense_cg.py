"""Conjugate gradients for small dense matrices: the ops of `cg` around products with the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.reference import plain
from tritonimplicit_kernels.reference.cg import cg_dots, cg_step
from tritonimplicit_kernels.reference.tiles import row_groups


def dense_cg(
    a: Tensor,
    rhs: Tensor,
    threshold: Tensor,
    maxiter: int,
    solution: Tensor,
    state: Tensor,
    residual_sq: Tensor,
) -> None:
    """Solve each system, and judge it by its true residual."""
    # So many matrices at a time that they stay in cache from the first iteration to the last.
    for rows in row_groups(a.flatten(1)) if a.device.type == "cpu" else [slice(None)]:
        _solve(
            *(a[rows], rhs[rows], threshold[rows], maxiter),
            *(solution[rows], state[:, rows], residual_sq[rows]),
        )


def _solve(
    a: Tensor,
    rhs: Tensor,
    threshold: Tensor,
    maxiter: int,
    solution: Tensor,
    state: Tensor,
    residual_sq: Tensor,
) -> None:
    """In units of the largest element of each right hand side: products with A stay small."""
    dots_of, step = (cg_dots, cg_step) if a.device.type == "cpu" else (plain.cg_dots, plain.cg_step)
    eps = torch.finfo(a.dtype).eps
    unit = rhs.abs().amax(1)
    unit = unit.masked_fill(unit == 0, 1.0)
    r, unit_sq = rhs / unit[:, None], unit.double().square()
    x, p, ap = torch.zeros_like(r), r.clone(), torch.empty_like(r)
    rr = _squares(r)
    threshold = torch.maximum(threshold / unit_sq, rr * (eps * eps))
    rr, rr_out, dots = rr[:, None], torch.empty_like(rr)[:, None], rr.new_empty(2, len(rr), 1)
    codes = torch.zeros_like(state)
    codes[0] = status.RUNNING
    codes_out, reached = torch.empty_like(codes), torch.empty_like(threshold)
    for _ in range(maxiter + 1):
        torch.sum(a * p[:, None, :], 2, out=ap)  # a row's sum does not depend on the others
        dots_of(p, ap, codes, dots)
        step(x, r, p, ap, dots, rr, codes, threshold, maxiter, rr_out, codes_out, reached)
        rr, rr_out, codes, codes_out = rr_out, rr, codes_out, codes
        if a.device.type == "cpu" and min(codes[0].tolist()) >= 0:
            break
    residual = r.copy_(rhs / unit[:, None]).double() - (a.double() * x.double()[:, None, :]).sum(2)
    squares = residual.square().sum(1)
    code, x = codes[0], x.mul_(unit[:, None])
    code.masked_fill_((code == status.CONVERGED) & (squares > threshold), status.STAGNATED)
    finite = (squares < torch.inf) & (x.abs().amax(1) < torch.inf)
    code.masked_fill_((code < status.BREAKDOWN) & ~finite, status.NON_FINITE)
    solution.copy_(x.masked_fill_((code == status.NON_FINITE)[:, None], torch.nan))
    state.copy_(codes)
    residual_sq.copy_(squares * unit_sq)


def _squares(v: Tensor) -> Tensor:
    return v.double().square().sum(1)
