"""Arnoldi's process by classical Gram-Schmidt done twice, and GMRES's residual norm.

Giraud, Langou, Rozloznik and van den Eshof, "Rounding error analysis of the classical Gram-Schmidt
orthogonalization process", Numer. Math. 101, 2005; Ayachour, "A fast implementation for GMRES
method", J. Comput. Appl. Math. 159, 2003. Off the CPU nothing is read by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels.reference import few
from tritonimplicit_kernels.reference.dots import row_squares
from tritonimplicit_kernels.reference.history import (
    frozen,
    less_combination,
    row_products,
    write_running,
)
from tritonimplicit_kernels.reference.rules import decide_arnoldi
from tritonimplicit_kernels.reference.tiles import total


def multi_dot(w: Tensor, basis: Tensor, count: int, state: Tensor, products: Tensor) -> None:
    """Write basis[j].w of each running system into `products[j]`, and zero for a frozen one."""
    write_running(products[:count], frozen(state), row_products(basis[:count], w))


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
    vectors, idle = basis[:count], frozen(state)
    less_combination(w, 1.0, _folded(first, count), vectors, w_out)
    write_running(second[:count], idle, row_products(vectors, w_out))
    write_running(ww, idle, row_squares(w_out))


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
    more = _folded(second, count)
    h, g = _folded(first, count) + more, left[:, :count]  # (B, count)
    # Pythagoras, as the basis is orthonormal: the second projection takes away next to nothing.
    rest_sq = (total(ww) - more.square().sum(1)).clamp_min_(0)
    size_sq = h.square().sum(1).add_(rest_sq)
    dot, left_sq = (g * h).sum(1), g.square().sum(1)
    negligible = size_sq * (10 * torch.finfo(w.dtype).eps) ** 2
    grows = rest_sq > negligible  # else the Krylov space is invariant
    singular = (rest_sq <= negligible) & (dot.square() <= negligible * left_sq)
    decision = total(rr), state, threshold, maxiter, state_out, residual_sq
    advances, rows = _decide(size_sq, grows, singular, *decision)
    entry = rest_sq.sqrt()
    growth = -dot / (entry if rows is advances else entry.masked_fill(~grows, 1.0))
    remaining = norm.square() / (left_sq + growth.square())
    _write(column[:, :count], advances, h)
    _write(column[:, count], advances, entry)
    _write(left[:, count], advances, growth)
    # The exact solution is in an invariant space: that is a claim, and the truth will tell.
    write_running(rr_out, None if rows is None else ~rows, remaining)
    if count < len(basis):
        _write_next(w, basis, count, more, entry, rows)


def _decide(
    size_sq: Tensor,
    grows: Tensor,
    singular: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Settle the state; return which systems advance, and which of these grow; None means all.

    One and the same where the host can see that all that advance grow.
    """
    decision = rr, state, threshold, maxiter, state_out, residual_sq
    if few.are_few(state):
        advance = few.decide_arnoldi(size_sq, singular, *decision)
        advances = None if all(advance) else state_out[0] < 0
        all_grow = all(g for g, a in zip(grows.tolist(), advance, strict=True) if a)
        if all_grow:
            return advances, advances
    else:
        advances = decide_arnoldi(size_sq, singular, *decision)
    return advances, grows if advances is None else advances & grows


def _write_next(
    w: Tensor, basis: Tensor, count: int, more: Tensor, entry: Tensor, rows: Tensor | None
) -> None:
    """Write the next basis vector of the systems in `rows` (B,), or of all."""
    rest = basis[count] if rows is None else torch.empty_like(w)
    entry = entry[:, None]
    torch.div(w, entry.to(w.dtype), out=rest)
    less_combination(rest, 1.0, more / entry, basis[:count], rest)  # in place: no copy of w
    if rows is not None:
        _write(basis[count], rows, rest)


def _folded(partials: Tensor, count: int) -> Tensor:
    """Return the sums (B, count) of the first of the partial sums (K, B, P)."""
    return total(partials[:count]).T.contiguous()


def _write(v: Tensor, rows: Tensor | None, value: Tensor) -> None:
    """Write the rows of `value` (B, ...), or all, into v."""
    if rows is None:
        v.copy_(value)
    else:
        torch.where(rows.view(-1, *[1] * (v.ndim - 1)), value, v, out=v)
