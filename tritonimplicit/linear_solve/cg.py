"""Conjugate gradient for symmetric (positive or negative) definite systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import build
from tritonimplicit.linear_solve.iterative import FusedSolver
from tritonimplicit.linear_solve.loop import Recurrence, solve_and_verify
from tritonimplicit.linear_solve.preconditioned_cg import DiagonalCG, PreconditionedCG
from tritonimplicit.linear_solve.preconditioners import Diagonal, row_preconditioner
from tritonimplicit.linear_solve.progress import Progress
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout


@dataclass(frozen=True, kw_only=True)
class CG(FusedSolver):
    """Conjugate gradient, for A symmetric and definite; (A + ridge I) x = b.

    The predict-and-recompute form (Chen and Carson, "Predict-and-recompute conjugate gradient
    variants", SIAM J. Sci. Comput. 42, 2020): two launches and one matvec an iteration, with
    `M=Jacobi()` too. With any other preconditioner `M`, which must be symmetric and definite, the
    textbook's form in plain torch.
    """

    symmetric: ClassVar[bool] = True

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        return conjugate_gradient(self, apply, layout.gather(b, "b"))


def conjugate_gradient(solver: FusedSolver, apply: RowMatvec, b: Tensor) -> RowSolution:
    """Solve A x = b on rows by CG, with the settings of `solver`."""
    precondition = row_preconditioner(solver.M, apply)
    if precondition is None:
        return solve_and_verify(solver, _ConjugateGradient(solver, apply, b))
    if isinstance(precondition, Diagonal):
        return solve_and_verify(solver, DiagonalCG(solver, apply, b, precondition))
    return solve_and_verify(solver, PreconditionedCG(solver, apply, b, precondition))


class _ConjugateGradient(Recurrence):
    def __init__(self, solver: FusedSolver, apply: RowMatvec, b: Tensor):
        self.apply, self.b = apply, b
        b_norm = kernels.row_norms(b)
        self.x, self._r, norm = solver.start(apply, b, b_norm)
        self._p = self._r.clone()
        self._maxiter = solver.iteration_limit(apply.layout)
        self._backend = solver.backend_for(apply, b)
        partials = self._backend.partial_count(b.shape[1])
        tolerance = solver.tolerance(b_norm, b.dtype)
        self.progress = Progress(norm, tolerance, partials)
        self._dots = b_norm.new_empty(2, b.shape[0], partials)

    def step(self) -> None:
        state = self.progress
        ap = self.apply.product(self._p)
        self._backend.cg_dots(self._p, ap, state.state, self._dots)
        self._backend.cg_step(
            self.x,
            self._r,
            self._p,
            ap,
            self._dots,
            state.rr,
            state.state,
            state.threshold,
            self._maxiter,
            state.rr_out,
            state.state_out,
            state.residual_sq,
        )

    def restart(self, again: Tensor, residual: Tensor) -> None:
        for v in (self._r, self._p):
            torch.where(again[:, None], residual, v, out=v)


def solve_cg(*, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any) -> CG:
    """Return a conjugate gradient solver, `(matvec, b) -> x`; `fields` are those of `CG`.

    `matvec` and `b` are accepted because calls written for TorchOpt give them here too, and not
    used: the solver is called with them.
    """
    return build(CG, fields)
