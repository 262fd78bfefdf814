"""Conjugate gradient on the normal equations, for any nonsingular system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.cg import conjugate_gradient
from tritonimplicit.linear_solve.preconditioners import PreconditionedSolver
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution, refuse_gradient
from tritonimplicit.operators import Matvec, transpose
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels import status as codes


@dataclass(frozen=True, kw_only=True)
class NormalCG(PreconditionedSolver):
    """Conjugate gradient on (A^T A + ridge I) x = A^T b: two matvecs an iteration, any square A.

    Tolerances and residuals are those of the normal equations; their condition number is A's
    squared. A^T b = 0 for a b that is not zero is a BREAKDOWN. A preconditioner `M` is
    about the inverse of that matrix, A^T A + ridge I, not of A: symmetric and definite. The
    transpose is the matvec's own `.T`, or recorded from it by autograd.
    """

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        rmatvec = transpose(matvec, like=b)

        def normal(v: TensorTree) -> TensorTree:
            return rmatvec(refuse_gradient(matvec(v)))

        apply = RowMatvec(normal, layout, self._ridge_rows(layout))
        rhs = layout.gather(rmatvec(b), layout.zeros, "the result of the transposed matvec")
        rows = conjugate_gradient(self, apply, rhs)
        # Where A^T b is zero, or too small for its digits, zero solves the normal equations and
        # says nothing of A x = b: A is singular, or the products underflow.
        smallest = torch.finfo(layout.dtype).tiny * layout.n
        given = kernels.row_norms(layout.gather(b, layout.zeros, "b")) > 0
        vanished = given & (kernels.row_norms(rhs) <= smallest)
        rows.status.masked_fill_(vanished & (rows.status == codes.CONVERGED), codes.BREAKDOWN)
        return rows


def solve_normal_cg(
    *, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any
) -> NormalCG:
    """Return a solver of A^T A x = A^T b by CG, `(matvec, b) -> x`; `fields` are `NormalCG`'s.

    `matvec` and `b` are accepted and not used, as by `solve_cg`.
    """
    return NormalCG(**fields)
