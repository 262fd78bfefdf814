"""The Neumann series, as a Richardson iteration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import check_real
from tritonimplicit.linear_solve.iterative import FusedSolver
from tritonimplicit.linear_solve.loop import Recurrence, solve_and_verify
from tritonimplicit.linear_solve.progress import Progress
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels import status as codes


@dataclass(frozen=True, kw_only=True)
class Neumann(FusedSolver):
    """alpha * sum over k = 0 .. maxiter of (I - alpha A)^k b: A^-1 b in the limit, if there is one.

    Computed as Richardson's iteration x <- x + alpha (b - A x), one launch and one matvec an
    iteration and one matvec more for the residual that is reported. It needs the spectral radius
    of I - alpha A below 1: contractions, A = I - J. `alpha` None is 1, `maxiter` None is 10; with
    rtol = atol = 0, the default, the series is not tested for convergence.
    """

    rtol: float = 0.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.alpha is not None:
            check_real("alpha", self.alpha)
            if self.alpha == 0:
                raise ValueError("alpha must not be zero: the series would stay at its start.")

    def iteration_limit(self, layout: Layout) -> int:
        """`maxiter`, or 10."""
        return 10 if self.maxiter is None else self.maxiter

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        recurrence = _Richardson(self, apply, layout.gather(b, layout.zeros, "b"))
        rows = solve_and_verify(self, recurrence, always=True)
        # Short of the kernel's limit, a residual above that of the start has diverged all the same.
        grown = rows.residual_norm > recurrence.start_norm
        rows.status.masked_fill_((rows.status == codes.MAX_ITERATIONS) & grown, codes.DIVERGED)
        return dataclasses.replace(rows, present=None)


class _Richardson(Recurrence):
    def __init__(self, solver: Neumann, apply: RowMatvec, b: Tensor):
        self.apply, self.b = apply, b
        self._maxiter = solver.iteration_limit(apply.layout)
        self._backend = kernels.backend(solver.backend, b.device, b.dtype)
        b_norm = kernels.row_norms(b)
        tolerance = solver.tolerance(b_norm, b.dtype)
        self.x, residual = solver.start(apply, b, b_norm)
        self.start_norm = kernels.row_norms(residual)
        alpha = 1.0 if solver.alpha is None else float(solver.alpha)
        self._alpha = torch.full_like(b_norm, alpha)
        # Beyond a growth of 1/eps no digit of the start is left.
        self._limit = (self.start_norm / torch.finfo(b.dtype).eps).square()
        partials = self._backend.partial_count(b.shape[1])
        self.progress = Progress(self.start_norm, tolerance, partials)
        # A launch tests the residual of the iterate before the one that it updates: x is one update
        # ahead of the residual norm in `progress`, from the start on.
        residual.masked_fill_((self.start_norm <= tolerance)[:, None], 0.0)
        self.x.add_(residual, alpha=alpha)

    def step(self) -> None:
        state = self.progress
        self._backend.neumann_step(
            self.x,
            self.apply(self.x),
            self.b,
            self._alpha,
            state.rr,
            state.state,
            state.threshold,
            self._limit,
            self._maxiter,
            state.rr_out,
            state.state_out,
            state.residual_sq,
        )

    def restart(self, rows: Tensor, residual: Tensor) -> None:
        self.x[rows] += self._alpha[rows, None].to(self.x.dtype) * residual[rows]
