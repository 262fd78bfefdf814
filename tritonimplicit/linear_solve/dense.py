"""Dense direct solve: the matrix materialised, column by column, and factorised by LU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import LinearSolver
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels import status as codes


@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """(A + ridge I) x = b by LU with partial pivoting; n matvecs and n^2 numbers for each system.

    A system is CONVERGED if its relative residual is at most sqrt(eps), STAGNATED above that (an
    ill-conditioned matrix), BREAKDOWN with a value of NaN if a pivot is exactly zero.
    """

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        rhs = layout.gather(b, layout.zeros, "b")
        elements = layout.elements()
        matrix = _materialise(apply, elements)
        solved, info = torch.linalg.solve_ex(matrix, rhs[:, elements])
        x = layout.zeros()
        x[:, elements] = solved
        residual_norm = kernels.row_norms(apply.residual(x, rhs))
        tolerance = math.sqrt(torch.finfo(layout.dtype).eps) * kernels.row_norms(rhs)
        status = torch.where(residual_norm <= tolerance, codes.CONVERGED, codes.STAGNATED)
        given = matrix.isfinite().all(2).all(1) & rhs.isfinite().all(1)
        status = torch.where(solved.isfinite().all(1) & given, status, codes.NON_FINITE)
        singular = given & (info != 0)
        status = torch.where(singular, codes.BREAKDOWN, status).int()
        x.masked_fill_(singular[:, None], math.nan)
        return RowSolution(x, status, torch.zeros_like(status), residual_norm)


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
