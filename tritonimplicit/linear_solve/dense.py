"""Dense direct solve: the matrix materialised, column by column, and factorised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import LinearSolver, check_tolerance
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels import status as codes


@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """(A + ridge I) x = b by LU with partial pivoting; n matvecs and n^2 numbers for each system.

    With `positive_definite` by Cholesky, of the lower triangle: half the work, and INDEFINITE with
    a value of NaN where the matrix is not positive definite. The residual that is reported, and
    judged, is that of the matrix in float64.

    A system is CONVERGED if its residual is at most max(rtol ‖b‖, atol), `rtol` None being
    sqrt(eps), or eps ‖b‖; STAGNATED above that (an ill-conditioned matrix), BREAKDOWN with a value
    of NaN if a pivot is exactly zero.
    """

    rtol: float | None = None
    atol: float = 0.0
    positive_definite: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.rtol is not None:
            check_tolerance("rtol", self.rtol)
        check_tolerance("atol", self.atol)

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        rhs = layout.gather(b, "b")
        elements = layout.elements()
        matrix, y = _materialise(apply, elements), rhs[:, elements]
        solved, failed = (_cholesky if self.positive_definite else _lu)(matrix, y)
        residual_norm = _residual_norm(matrix, solved, y)
        eps = torch.finfo(layout.dtype).eps
        relative = math.sqrt(eps) if self.rtol is None else max(self.rtol, eps)
        tolerance = (relative * kernels.row_norms(rhs)).clamp(min=self.atol)
        status = torch.where(residual_norm <= tolerance, codes.CONVERGED, codes.STAGNATED)
        given = matrix.isfinite().all(2).all(1) & y.isfinite().all(1)
        status = torch.where(solved.isfinite().all(1) & given, status, codes.NON_FINITE)
        failure = codes.INDEFINITE if self.positive_definite else codes.BREAKDOWN
        failed &= given
        status = torch.where(failed, failure, status).int()
        x = layout.zeros()
        x[:, elements] = solved.masked_fill(failed[:, None], math.nan)
        return RowSolution(x, status, torch.zeros_like(status), residual_norm)


def _lu(matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, n), and (B,) whether a pivot was zero."""
    solved, info = torch.linalg.solve_ex(matrix, b)
    return solved, info != 0


def _cholesky(matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, n), and (B,) whether the matrix is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(b[:, :, None], factor)[:, :, 0], info != 0


def _residual_norm(matrix: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """(B,) float64: ‖b - A x‖, in float64 whatever the working precision."""
    return kernels.row_norms(
        b.double() - torch.bmm(matrix.double(), x.double()[:, :, None])[:, :, 0]
    )


def _materialise(apply: RowMatvec, elements: Tensor) -> Tensor:
    """(B, n, n): the product with each unit vector, in all systems at once."""
    n = elements.numel()
    unit = apply.layout.zeros()
    matrix = unit.new_empty(unit.shape[0], n, n)
    for column, element in enumerate(elements.tolist()):
        unit[:, element] = 1.0
        matrix[:, :, column] = apply(unit)[:, elements]
        unit[:, element] = 0.0
    return matrix
