"""Conjugate gradient on the normal equations, for any nonsingular system."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_operator import LinearOperator
from tritonimplicit.linear_solve.base import LinearSolver, build
from tritonimplicit.linear_solve.cg import CG, conjugate_gradient
from tritonimplicit.linear_solve.iterative import FusedSolver
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution, refuse_gradient
from tritonimplicit.operators import Matvec, transpose
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels import status as codes


@dataclass(frozen=True, kw_only=True)
class NormalCG(FusedSolver):
    """Conjugate gradient on (A^T A + ridge I) x = A^T b: two matvecs an iteration, any square A.

    Tolerances and residuals are those of the normal equations; their condition number is A's
    squared. A^T b = 0 for a b that is not zero is a BREAKDOWN. A preconditioner `M` is about the
    inverse of that matrix, A^T A + ridge I, not of A: symmetric and definite. The transpose is the
    matvec's own `.T`, or recorded from it by autograd.
    """

    def equation(self, matvec: Matvec, b: TensorTree) -> tuple[LinearSolver, Matvec, TensorTree]:
        """Return (solver, A, b) with the same x: with a ridge, the normal equations' own."""
        if self.ridge is None:
            return self, matvec, b
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return CG(**fields).equation(*normal_equations(matvec, b))

    def open_ridge(self) -> LinearSolver:
        """Raise: the ridge is none of the matrix, but of A^T A."""
        raise RuntimeError(
            "NormalCG's ridge is differentiated, but it is a ridge on A^T A, for which custom_root "
            "has no derivative: write it into the optimality, or use solve_cg or solve_gmres."
        )

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        rmatvec = transpose(matvec, like=b)

        def normal(v: TensorTree) -> TensorTree:
            av = matvec(v)
            refuse_gradient([t for t in optree.tree_leaves(av) if isinstance(t, Tensor)])
            return rmatvec(av)

        apply = RowMatvec(normal, layout, self._ridge_rows(layout))
        # Copied: an operator may use one buffer for all its results.
        rhs = layout.flatten(rmatvec(b), "the result of the transposed matvec")
        rows = conjugate_gradient(self, apply, rhs)
        # Where A^T b is zero, or too small for its digits, zero solves the normal equations and
        # says nothing of A x = b: A is singular, or the products underflow.
        smallest = torch.finfo(layout.dtype).tiny * layout.n
        given = kernels.row_norms(layout.gather(b, "b")) > 0
        vanished = given & (kernels.row_norms(rhs) <= smallest)
        rows.status.masked_fill_(vanished & (rows.status == codes.CONVERGED), codes.BREAKDOWN)
        return dataclasses.replace(rows, present=None)


def normal_equations(matvec: Matvec, b: TensorTree) -> tuple[Matvec, TensorTree]:
    """Return (A^T A, A^T b), differentiable in what A and b depend on."""
    if not isinstance(matvec, LinearOperator):
        rmatvec = transpose(matvec, like=b)
        return lambda v: rmatvec(matvec(v)), rmatvec(b)
    fn = matvec.fn

    def pull(u: TensorTree, *tensors: TensorTree) -> TensorTree:
        origin = optree.tree_map(torch.zeros_like, u)
        return torch.func.vjp(lambda v: fn(v, *tensors), origin)[1](u)[0]

    normal = LinearOperator(
        lambda v, *tensors: pull(fn(v, *tensors), *tensors), *matvec.tensors, symmetric=True
    )
    return normal, pull(b, *matvec.tensors)


def solve_normal_cg(
    *, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any
) -> NormalCG:
    """Return a solver of A^T A x = A^T b by CG, `(matvec, b) -> x`; `fields` are `NormalCG`'s.

    `matvec` and `b` are accepted and not used, as by `solve_cg`.
    """
    return build(NormalCG, fields)
