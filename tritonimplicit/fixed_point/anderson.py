"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.fixed_point.base import FixedPointSolver
from tritonimplicit.fixed_point.iteration import Iteration, divided
from tritonimplicit.linear_solve.base import check_count, check_real
from tritonimplicit.linear_solve.plain import column, full_precision, normalised
from tritonimplicit.linear_solve.rows import RowMatvec


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration of z <- f(z) by the last m + 1 iterates, for each sample by itself.

    With r = f(z) - z, and the columns of dZ and dR the last m differences of iterates and of their
    residuals, z <- z + beta r - (dZ + beta dR) c, c that of least ‖r - dR c‖. On a linear map of
    dimension m that is GMRES. It keeps 2 m vectors. The least squares problem is solved by normal
    equations of unit columns in float64, with a ridge at the rounding level of the vectors.

    Anderson, "Iterative procedures for nonlinear integral equations", J. ACM 12, 1965; in the form
    of Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49,
    2011.
    """

    m: int = 5
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_count("m", self.m)
        if self.m == 0:
            raise ValueError("m must be at least 1: with no differences there is Picard.")
        check_real("beta", self.beta)
        if self.beta == 0:
            raise ValueError("beta must not be zero: z would stay in the span of its differences.")

    def _iteration(self, f: RowMatvec, z: Tensor) -> Iteration:
        return _Mixing(self, f, z)


class _Mixing(Iteration):
    """`_residuals[j]` is a column of dR made a unit vector, `_moves[j]` that of dZ + beta dR."""

    def __init__(self, solver: Anderson, f: RowMatvec, z: Tensor):
        super().__init__(solver, f, z)
        self._beta = solver.beta
        m = max(1, min(solver.m, solver.maxiter - 1))
        self._residuals = z.new_zeros(m, *z.shape)
        self._moves = torch.zeros_like(self._residuals)
        self._gram = z.new_zeros(len(z), m, m, dtype=torch.float64)
        self._ridge = torch.finfo(z.dtype).eps * torch.eye(m, dtype=torch.float64, device=z.device)
        self._count = 0
        self._before: tuple[Tensor, Tensor] | None = None

    def _next(self) -> Tensor:
        if self._before is not None:
            self._remember(*self._before)
        self._before = self.z, self.residual
        move = self._beta * self.residual
        k = min(self._count, len(self._residuals))
        if k == 0:
            return self.z + move
        unit, norm = normalised(self.residual)
        with full_precision(self.z.device):
            rhs = torch.bmm(unit[:, None], self._residuals[:k].permute(1, 2, 0)).mT.double()
            c = _positive_solve(self._gram[:, :k, :k] + self._ridge[:k, :k], rhs)
            mixed = torch.bmm(c.mT.to(unit.dtype), self._moves[:k].transpose(0, 1))[:, 0]
        return self.z + move - column(norm, mixed.dtype) * mixed

    def _remember(self, z: Tensor, residual: Tensor) -> None:
        """Put the last difference in the place of the oldest."""
        m = len(self._residuals)
        j, self._count = self._count % m, self._count + 1
        difference = self.residual - residual
        norm = kernels.row_norms(difference)
        self._residuals[j] = unit = divided(difference, norm)
        self._moves[j] = divided(self.z - z, norm) + self._beta * unit
        with full_precision(unit.device):
            # As rows: the product with a column is many times slower.
            row = torch.bmm(unit[:, None], self._residuals.permute(1, 2, 0))[:, 0]
        self._gram[:, j] = self._gram[:, :, j] = row.double()


def _positive_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve small positive definite systems, (B, k, k) and (B, k, 1), the host asking nothing.

    Zero where a matrix is not: the step is then a plain one.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(rhs, factor)
    return torch.where((info == 0)[:, None, None], solution, 0.0)
