"""The solver that looks at the operator and picks another."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import LinearSolver, build
from tritonimplicit.linear_solve.cg import CG
from tritonimplicit.linear_solve.dense import Dense
from tritonimplicit.linear_solve.gmres import GMRES
from tritonimplicit.linear_solve.iterative import IterativeSolver
from tritonimplicit.linear_solve.minres import MINRES
from tritonimplicit.linear_solve.probes import orthonormal, repeated
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout

SMALL: Final = 32
"""Unknowns up to which n products and a factorisation beat a Krylov method's iterations."""


@dataclass(frozen=True, kw_only=True)
class Auto(IterativeSolver):
    """Picks a method for (A + ridge I) x = b by what it can learn of A; the Solution names it.

    `Dense` up to 32 unknowns a system (by Cholesky if A is positive definite), else `CG` if it is
    positive definite, `MINRES` if it is symmetric, `GMRES` if not. An operator says of itself that
    it is symmetric or positive definite: a `LinearOperator` that was told so, or the Jacobian of
    an optimality that is the gradient of an objective. Of any other, symmetry is tested: u.A v
    against v.A u for two random vectors, 2 products and a look by the host. Definiteness cannot be
    tested so cheaply, and MINRES does without.

    Fields are those of iterative solvers, and go to the method; of `Dense` there are `rtol` and
    `atol`.
    """

    def _choose(self, matvec: Matvec, b: TensorTree, layout: Layout) -> LinearSolver:
        definite = getattr(matvec, "positive_definite", False)
        if layout.n <= SMALL:
            return Dense(
                rtol=self.rtol,
                atol=self.atol,
                positive_definite=definite,
                ridge=self.ridge,
                batch_ndim=self.batch_ndim,
                on_failure=self.on_failure,
            )
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if definite:
            return CG(**fields)
        if getattr(matvec, "symmetric", False) or _looks_symmetric(RowMatvec(matvec, layout)):
            return MINRES(**fields)
        return GMRES(**fields)

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        raise AssertionError("the method that _choose returns solves it.")


def _looks_symmetric(apply: RowMatvec) -> bool:
    """Whether u.A v = v.A u to rounding, in every system, for two random vectors u and v."""
    layout = apply.layout
    u, v = (repeated(row, layout) for row in orthonormal(layout, 2, seed=0))
    au, av = apply(u).clone(), apply(v)
    size = kernels.row_norms(au) + kernels.row_norms(av)
    coarsest = max(torch.finfo(dtype).eps for dtype in layout.dtypes)  # that products round to
    difference: Tensor = (kernels.row_dots(u, av) - kernels.row_dots(v, au)).abs()
    # Roundings of A v add up along u as at random: to ‖A v‖ / sqrt(n), not to ‖A v‖.
    return bool((difference <= 32 * coarsest / math.sqrt(layout.n) * size).all())


def solve_auto(*, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any) -> Auto:
    """Return a solver that picks its method, `(matvec, b) -> x`; `fields` are those of `Auto`.

    `matvec` and `b` are accepted and not used, as by `solve_cg`.
    """
    return build(Auto, fields)
