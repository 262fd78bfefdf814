"""MINRES, for symmetric systems, definite or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

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
class MINRES(IterativeSolver):
    """MINRES, for A symmetric, indefinite or singular too; (A + ridge I) x = b.

    The x of least residual in the Krylov space, one matvec an iteration, 8 vectors. A singular
    system that has a solution gets one; where it has none, x is of least residual and the status is
    BREAKDOWN, or what rounding leaves of it. `M`, symmetric positive definite, approximates the
    inverse of A; what is then least is the residual's norm in the inner product of `M`, and what is
    tested the Euclidean one.

    Paige and Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer.
    Anal. 12, 1975.
    """

    symmetric: ClassVar[bool] = True

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        precondition = row_preconditioner(self.M, apply)
        rhs = layout.gather(b, "b")
        return solve_and_verify(self, _Lanczos(self, apply, rhs, precondition))


class _Lanczos(Recurrence):
    """Lanczos' process A M V_k = V_{k+1} T_k, and the QR factors of T by Givens rotations.

    The vectors v are orthonormal in the inner product of M, z = M v. Names of scalars are those of
    Elman, Silvester and Wathen, "Finite Elements and Fast Iterative Solvers", algorithm 4.1.
    """

    _v: Tensor
    _v_before: Tensor
    _z: Tensor
    _w: Tensor
    _w_before: Tensor
    _r: Tensor  # only with a preconditioner
    _gamma: Tensor
    _cosines: tuple[Tensor, Tensor]
    _sines: tuple[Tensor, Tensor]
    _eta: Tensor
    _size_sq: Tensor
    _indefinite: Tensor

    def __init__(
        self, solver: MINRES, apply: RowMatvec, b: Tensor, precondition: RowFunction | None
    ):
        self.apply, self.b, self._precondition = apply, b, precondition
        self._maxiter = solver.iteration_limit(apply.layout)
        self._negligible = 10 * torch.finfo(b.dtype).eps
        b_norm = kernels.row_norms(b)
        self.x, residual, norm = solver.start(apply, b, b_norm)
        self.progress = Progress(norm, solver.tolerance(b_norm, b.dtype), partials=1)
        self._begin(residual)

    def step(self) -> None:
        state, dtype, last_gamma = self.progress, self.x.dtype, self._gamma
        az = self.apply(self._z)
        delta = kernels.row_dots(self._z, az)
        u = az - self._v * column(delta, dtype)
        u -= self._v_before * column(last_gamma, dtype)
        mu, gamma_sq = self._measured(u)
        size_sq = last_gamma.square() + delta.square() + gamma_sq.abs()
        gamma = gamma_sq.clamp(min=0.0).sqrt()
        (c_before, c), (s_before, s) = self._cosines, self._sines
        alpha_0 = c * delta - c_before * s * last_gamma
        alpha_1 = (alpha_0.square() + gamma_sq.clamp(min=0.0)).sqrt()
        alpha_2 = s * delta + c_before * c * last_gamma
        alpha_3 = s_before * last_gamma
        # ‖A r‖ / ‖r‖ against an estimate of ‖A‖: where it vanishes, r is as small as it gets.
        self._size_sq = torch.maximum(self._size_sq, size_sq)
        slope_sq = alpha_0.square() + (c * gamma).square()
        singular = slope_sq <= self._negligible**2 * self._size_sq
        indefinite = self._indefinite | (gamma_sq < -self._negligible * size_sq)
        advances = advance(
            state,
            self._maxiter,
            (codes.BREAKDOWN, singular),
            (codes.PRECONDITIONER, indefinite),
            (codes.NON_FINITE, ~(size_sq < math.inf)),
        )
        c, s = alpha_0 / alpha_1, gamma / alpha_1
        self._move(alpha_1, alpha_2, alpha_3, c * self._eta, advances)
        self._eta = -s * self._eta
        self._cosines, self._sines, self._gamma = (self._cosines[1], c), (self._sines[1], s), gamma
        self._v_before, self._v = self._v, _over(u, gamma)
        self._z = self._v if mu is None else _over(mu, gamma)
        record(state, advances, self._residual_sq(c, s))

    def _move(
        self, alpha_1: Tensor, alpha_2: Tensor, alpha_3: Tensor, length: Tensor, advances: Tensor
    ) -> None:
        """x along the next search direction, w."""
        dtype = self.x.dtype
        w = self._z - self._w * column(alpha_2, dtype)
        w -= self._w_before * column(alpha_3, dtype)
        self._w_before, self._w = self._w, w.div_(column(alpha_1, dtype))
        self.x += kept(w * column(length, dtype), advances)

    def _residual_sq(self, c: Tensor, s: Tensor) -> Tensor:
        """The squared Euclidean norm of the residual: |eta| is its norm in M."""
        if self._precondition is None:
            return self._eta.square()
        dtype = self.x.dtype
        self._r = self._r * column(s.square(), dtype) + self._v * column(c * self._eta, dtype)
        return kernels.row_norms(self._r).square()

    def _measured(self, u: Tensor) -> tuple[Tensor | None, Tensor]:
        """M u and u.M u; without a preconditioner, None and u.u."""
        if self._precondition is None:
            return None, kernels.row_norms(u).square()
        mu = self._precondition(u)
        return mu, kernels.row_dots(u, mu)

    def restart(self, again: Tensor, residual: Tensor) -> None:
        # All begin again, those that are frozen for nothing.
        self._begin(residual)

    def _begin(self, residual: Tensor) -> None:
        v, norm = normalised(residual)
        mv, gamma_sq = self._measured(v)
        gamma = gamma_sq.clamp(min=0.0).sqrt()
        self._indefinite = (gamma_sq <= 0) & (norm > 0)
        self._eta = norm * gamma
        self._v = _over(v, gamma)
        self._z = self._v if mv is None else _over(mv, gamma)
        self._v_before = self._w = self._w_before = torch.zeros_like(v)
        zero, one = torch.zeros_like(norm), torch.ones_like(norm)
        self._gamma = self._size_sq = zero
        self._cosines, self._sines = (one, one), (zero, zero)
        if mv is not None:
            self._r = residual.clone()


def _over(v: Tensor, norm: Tensor) -> Tensor:
    """v / norm, zero where the norm is."""
    return v / column(norm.masked_fill(norm == 0, 1.0), v.dtype)


def solve_minres(
    *, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any
) -> MINRES:
    """Return a MINRES solver, `(matvec, b) -> x`; `fields` are those of `MINRES`.

    `matvec` and `b` are accepted and not used, as by `solve_cg`.
    """
    return build(MINRES, fields)
