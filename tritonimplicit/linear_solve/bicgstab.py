"""BiCGSTAB, for any nonsingular system, in the memory of a few vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import build
from tritonimplicit.linear_solve.iterative import IterativeSolver
from tritonimplicit.linear_solve.loop import Recurrence, solve_and_verify
from tritonimplicit.linear_solve.plain import (
    RowFunction,
    advance,
    column,
    kept,
    normalised,
    record,
)
from tritonimplicit.linear_solve.preconditioners import row_preconditioner
from tritonimplicit.linear_solve.progress import Progress
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels import status as codes


@dataclass(frozen=True, kw_only=True)
class BiCGSTAB(IterativeSolver):
    """BiCGSTAB, for any nonsingular A; (A + ridge I) x = b. Two matvecs an iteration, 8 vectors.

    Where a denominator vanishes, the method begins again with the residual as shadow residual; if
    that does not help, it is a BREAKDOWN. `M` approximates the inverse of A and preconditions from
    the right, so that residuals are those of A x = b.

    van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of
    nonsymmetric linear systems", SIAM J. Sci. Stat. Comput. 13, 1992.
    """

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        precondition = row_preconditioner(self.M, apply)
        rhs = layout.gather(b, layout.zeros, "b")
        return solve_and_verify(self, _BiCGSTAB(self, apply, rhs, precondition))


class _BiCGSTAB(Recurrence):
    """All vectors but x are in units of the residual norm at the start: products with A stay small.

    The names are van der Vorst's; `shadow` is his r hat.
    """

    _r: Tensor
    _p: Tensor
    _shadow: Tensor
    _shadow_norm: Tensor
    _rho: Tensor
    _fresh: Tensor
    _unit: Tensor

    def __init__(
        self, solver: BiCGSTAB, apply: RowMatvec, b: Tensor, precondition: RowFunction | None
    ):
        self.apply, self.b = apply, b
        self._precondition = precondition or (lambda v: v)
        self._maxiter = solver.iteration_limit(apply.layout)
        self._eps = torch.finfo(b.dtype).eps
        b_norm = kernels.row_norms(b)
        self.x, residual = solver.start(apply, b, b_norm)
        norm = kernels.row_norms(residual)
        self.progress = Progress(norm, solver.tolerance(b_norm, b.dtype), partials=1)
        # Beyond a growth of 1/eps no digit of the start is left.
        self._limit = (norm / self._eps).square()
        self._v = torch.empty_like(b)
        self._begin(residual, norm)

    def step(self) -> None:
        state, eps, dtype = self.progress, self._eps, self.x.dtype
        y = self._precondition(self._p)
        v = self._v.copy_(self.apply(y))
        v_norm, along = kernels.row_norms(v), kernels.row_dots(self._shadow, v)
        lost = ~(along.abs() > eps * self._shadow_norm * v_norm)
        advances = advance(
            state,
            self._maxiter,
            (codes.BREAKDOWN, lost & self._fresh),
            (codes.DIVERGED, state.rr[:, 0] > self._limit),
            (codes.NON_FINITE, ~(v_norm < math.inf)),
        )
        alpha = torch.where(advances & ~lost, self._rho / along, 0.0)
        self._add(alpha, y)
        s = self._r - v * column(alpha, dtype)
        s_norm = kernels.row_norms(s)
        z = self._precondition(s)
        t = self.apply(z)
        t_norm, ts = kernels.row_norms(t), kernels.row_dots(t, s)
        useful = ((s_norm * self._unit).square() > state.threshold) & (
            ts.abs() > eps * t_norm * s_norm
        )
        omega = torch.where(advances & useful, ts / t_norm.square(), 0.0)
        self._add(omega, z)
        self._r = s - t * column(omega, dtype)
        r_norm = kernels.row_norms(self._r)
        self._turn(alpha, omega, v, r_norm)
        record(state, advances, (r_norm * self._unit).square())

    def _turn(self, alpha: Tensor, omega: Tensor, v: Tensor, r_norm: Tensor) -> None:
        """The next direction; along the residual itself, with a new shadow, where rho is lost."""
        dtype = v.dtype
        rho = kernels.row_dots(self._shadow, self._r)
        beta = rho / self._rho * (alpha / omega)
        goes_on = rho.abs() > self._eps * self._shadow_norm * r_norm
        fresh = ~(goes_on & (alpha != 0) & (omega != 0))
        self._p.sub_(v * column(omega, dtype)).mul_(column(beta, dtype))
        kept(self._p, ~fresh).add_(self._r)
        self._shadow = torch.where(fresh[:, None], self._r, self._shadow)
        self._shadow_norm = torch.where(fresh, r_norm, self._shadow_norm)
        self._rho = torch.where(fresh, r_norm.square(), rho)
        self._fresh = fresh

    def _add(self, scalar: Tensor, v: Tensor) -> None:
        """x += scalar v where the scalar is not zero; elsewhere x is kept, whatever v."""
        self.x += kept(v * column(scalar * self._unit, v.dtype), scalar != 0)

    def restart(self, again: Tensor, residual: Tensor) -> None:
        # All begin again, those that are frozen for nothing.
        self._begin(residual, kernels.row_norms(residual))

    def _begin(self, residual: Tensor, norm: Tensor) -> None:
        self._r = self._shadow = normalised(residual)[0]
        self._p = self._r.clone()
        self._unit = norm
        self._shadow_norm = self._rho = torch.ones_like(norm)
        self._fresh = torch.ones_like(norm, dtype=torch.bool)


def solve_bicgstab(
    *, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any
) -> BiCGSTAB:
    """Return a BiCGSTAB solver, `(matvec, b) -> x`; `fields` are those of `BiCGSTAB`.

    `matvec` and `b` are accepted and not used, as by `solve_cg`.
    """
    return build(BiCGSTAB, fields)
