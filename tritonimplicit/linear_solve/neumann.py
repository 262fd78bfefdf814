"""The Neumann series, as a Richardson iteration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import Status, TensorTree
from tritonimplicit.linear_solve.base import check_real
from tritonimplicit.linear_solve.iterative import FusedSolver
from tritonimplicit.linear_solve.loop import Recurrence, solve_and_verify
from tritonimplicit.linear_solve.plain import kept
from tritonimplicit.linear_solve.power import largest_eigenvalue
from tritonimplicit.linear_solve.preconditioners import row_preconditioner
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

    `alpha="estimate"` is for A symmetric positive definite of any scale: 1 / (largest eigenvalue),
    for each system, by a power iteration of 11 to 22 matvecs (see `power.largest_eigenvalue`). With
    a preconditioner `M` the iteration is x <- x + alpha M (b - A x): the conditions on A, and the
    estimate, are then for M A.
    """

    rtol: float = 0.0
    alpha: float | Literal["estimate"] | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if isinstance(self.alpha, str):
            if self.alpha != "estimate":
                raise ValueError(f"alpha must be a number, 'estimate' or None, not {self.alpha!r}.")
        elif self.alpha is not None:
            check_real("alpha", self.alpha)
            if self.alpha == 0:
                raise ValueError("alpha must not be zero: the series would stay at its start.")

    def iteration_limit(self, layout: Layout) -> int:
        """`maxiter`, or 10."""
        return 10 if self.maxiter is None else self.maxiter

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        recurrence = _Richardson(self, apply, layout.gather(b, "b"))
        rows = solve_and_verify(self, recurrence, always=True)
        # Short of the kernel's limit, a residual above that of the start has diverged all the same.
        if rows.present is not None and Status.MAX_ITERATIONS not in rows.present:
            return rows
        grown = rows.residual_norm > recurrence.start_norm
        rows.status.masked_fill_((rows.status == codes.MAX_ITERATIONS) & grown, codes.DIVERGED)
        return dataclasses.replace(rows, present=None)


class _Richardson(Recurrence):
    def __init__(self, solver: Neumann, apply: RowMatvec, b: Tensor):
        self.apply, self.b = apply, b
        self._precondition = row_preconditioner(solver.M, apply)
        self._maxiter = solver.iteration_limit(apply.layout)
        self._backend = solver.backend_for(apply, b)
        b_norm = kernels.row_norms(b)
        tolerance = solver.tolerance(b_norm, b.dtype)
        self.x, residual, self.start_norm = solver.start(apply, b, b_norm)
        self._alpha = self._step_length(solver.alpha)
        # Beyond a growth of 1/eps no digit of the start is left.
        self._limit = (self.start_norm / torch.finfo(b.dtype).eps).square()
        partials = self._backend.partial_count(b.shape[1])
        self.progress = Progress(self.start_norm, tolerance, partials)
        # A launch tests the residual of the iterate before the one that it updates: x is one update
        # ahead of the residual norm in `progress`, from the start on.
        self.x.add_(kept(self._update(residual), ~(self.start_norm <= tolerance)))

    def step(self) -> None:
        state = self.progress
        if self._precondition is None:
            self._launch(self.apply.product(self.x), self.b)
            return
        residual = torch.sub(self.b, self.apply(self.x))
        # The launch adds alpha (z - 0); the residual's norm that it leaves is z's, to be replaced.
        self._launch(torch.zeros_like(residual), self._precondition(residual))
        squares = kernels.row_norms(residual).square_()
        state.rr_out.zero_()
        state.rr_out[:, 0] = squares.masked_fill_(state.state_out[0] >= 0, 0.0)

    def restart(self, again: Tensor, residual: Tensor) -> None:
        self.x.add_(kept(self._update(residual), again))

    def _launch(self, ax: Tensor, b: Tensor) -> None:
        state = self.progress
        self._backend.neumann_step(
            self.x,
            ax,
            b,
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

    def _update(self, residual: Tensor) -> Tensor:
        """Alpha M (b - A x), given b - A x, which it may be written over."""
        alpha = self._alpha.to(residual.dtype)[:, None]
        if self._precondition is None:
            return residual.mul_(alpha)
        return self._precondition(residual) * alpha

    def _step_length(self, alpha: float | Literal["estimate"] | None) -> Tensor:
        """(B,) float64."""
        if alpha != "estimate":
            return torch.full_like(self.start_norm, 1.0 if alpha is None else float(alpha))
        size = largest_eigenvalue(self._system, self.apply.layout)
        return torch.where(size == 0, 1.0, size.reciprocal())  # A = 0 has no scale to fit

    def _system(self, v: Tensor) -> Tensor:
        """The matrix that the iteration works on: A, or M A."""
        av = self.apply(v)
        return av if self._precondition is None else self._precondition(av)
