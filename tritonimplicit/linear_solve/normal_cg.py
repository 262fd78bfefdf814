"""Conjugate gradient on the normal equations, for any nonsingular system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import IterativeSolver
from tritonimplicit.linear_solve.cg import conjugate_gradient
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec, transpose
from tritonimplicit.vectors import Layout


@dataclass(frozen=True, kw_only=True)
class NormalCG(IterativeSolver):
    """Conjugate gradient on (A^T A + ridge I) x = A^T b: two matvecs an iteration, any square A.

    Tolerances and residuals are those of the normal equations; their condition number is A's
    squared. The transpose is the matvec's own `.T`, or recorded from it by autograd.
    """

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        rmatvec = transpose(matvec, like=b)
        apply = RowMatvec(lambda v: rmatvec(matvec(v)), layout, self._ridge_rows(layout))
        rhs = layout.gather(rmatvec(b), layout.zeros, "the result of the transposed matvec")
        return conjugate_gradient(self, apply, rhs)


def solve_normal_cg(
    *, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any
) -> NormalCG:
    """Return a solver of A^T A x = A^T b by CG, `(matvec, b) -> x`; `fields` are `NormalCG`'s.

    `matvec` and `b` are accepted and not used, as by `solve_cg`.
    """
    return NormalCG(**fields)
