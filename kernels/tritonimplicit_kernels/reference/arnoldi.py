"""Arnoldi's process by classical Gram-Schmidt done twice, and GMRES's residual norm.

Giraud, Langou, Rozloznik and van den Eshof, "Rounding error analysis of the classical Gram-Schmidt
orthogonalization process", Numer. Math. 101, 2005; Ayachour, "A fast implementation for GMRES
method", J. Comput. Appl. Math. 159, 2003. Off the CPU nothing is read by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.dots import row_squares
from tritonimplicit_kernels.reference.history import less_combination, row_products
from tritonimplicit_kernels.reference.rules import decide_arnoldi


def multi_dot(v: Tensor, basis: Tensor, count: int, state: Tensor, products: Tensor) -> None:
    """Write basis[j].v of each running system into `products[j]`, and zero for a frozen one."""
    sums = row_products(basis[:count], v)
    _write_sums(products[:count], state[0] < 0, sums.T)


def arnoldi_project(
    w: Tensor,
    basis: Tensor,
    count: int,
    first: Tensor,
    state: Tensor,
    w_out: Tensor,
    second: Tensor,
    ww: Tensor,
) -> None:
    """Write w less its part in the basis, and that rest's dots with the basis and itself."""
    vectors, runs = basis[:count], state[0] < 0
    less_combination(w, 1.0, _folded(first[:count]), vectors, w_out)
    _write_sums(second[:count], runs, row_products(vectors, w_out).T)
    _write_sums(ww, runs, row_squares(w_out))


def arnoldi_step(
    w: Tensor,
    basis: Tensor,
    count: int,
    first: Tensor,
    second: Tensor,
    ww: Tensor,
    left: Tensor,
    column: Tensor,
    norm: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    rr_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Advance each running system's Krylov space by one vector, or stop it."""
    more = _folded(second[:count])
    h = _folded(first[:count]) + more  # (B, count)
    advances, grows, entry, growth, remaining = decide_arnoldi(
        *(h, more, ww, left[:, :count], norm, rr, state, threshold, maxiter),
        *(state_out, residual_sq, w.dtype),
    )
    _write(column[:, :count], advances[:, None], h)
    _write(column[:, count], advances, entry)
    _write(left[:, count], advances, growth)
    _write_sums(rr_out, advances, remaining)
    if count < len(basis):
        following, vectors = basis[count], basis[:count]
        at_once = w.device.type == "cpu" and all(grows.tolist())
        target = following if at_once else torch.empty_like(w)
        rest = less_combination(w, 1.0, more, vectors, target)
        rest.div_(entry.to(w.dtype)[:, None])
        if not at_once:
            _write(following, grows[:, None], rest)


def _folded(partials: Tensor) -> Tensor:
    """Return the sums (B, k) of partial sums (k, B, P)."""
    return partials.sum(-1).T.contiguous()


def _write(v: Tensor, rows: Tensor, value: Tensor) -> None:
    torch.where(rows, value, v, out=v)


def _write_sums(out: Tensor, rows: Tensor, sums: Tensor) -> None:
    """Write sums (..., B) as the first of the partial sums `out` (..., B, P)."""
    out.zero_()
    out[..., 0] = torch.where(rows, sums, 0.0)
