"""Preconditioned conjugate gradient: fused for a diagonal M, in plain torch for any other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.linear_solve.iterative import FusedSolver
from tritonimplicit.linear_solve.loop import Recurrence
from tritonimplicit.linear_solve.plain import advance, record
from tritonimplicit.linear_solve.preconditioners import Diagonal
from tritonimplicit.linear_solve.progress import Progress
from tritonimplicit.linear_solve.rows import RowMatvec
from tritonimplicit_kernels import status as codes


class DiagonalCG(Recurrence):
    """CG on A x = b for symmetric definite A and a positive diagonal M, by fused kernels.

    The predict-and-recompute form (Chen and Carson, "Predict-and-recompute conjugate gradient
    variants", SIAM J. Sci. Comput. 42, 2020), as of CG without M: two launches and one product with
    A an iteration. It stops by the norm of the residual b - A x, not by r.z.
    """

    def __init__(self, solver: FusedSolver, apply: RowMatvec, b: Tensor, M: Diagonal):
        self.apply, self.b = apply, b
        self._precondition = M
        b_norm = kernels.row_norms(b)
        self.x, self._r, norm = solver.start(apply, b, b_norm)
        self._p = M(self._r)
        self._maxiter = solver.iteration_limit(apply.layout)
        self._backend = solver.backend_for(apply, b)
        partials = self._backend.partial_count(b.shape[1])
        tolerance = solver.tolerance(b_norm, b.dtype)
        self.progress = Progress(norm, tolerance, partials)
        self._dots = b_norm.new_empty(2, b.shape[0], partials)
        self._rz = torch.zeros_like(self.progress.rr), torch.zeros_like(self.progress.rr)
        self._rz[0][:, 0] = kernels.row_weighted_squares(self._r, M.inverse)
        self._first_rr = self.progress.rr

    def step(self) -> None:
        """Do one iteration on the systems that run, or stop them."""
        state, d = self.progress, self._precondition.inverse
        rz, rz_out = self._current_rz()
        ap = self.apply.product(self._p)
        self._backend.pcg_dots(self._p, ap, d, state.state, self._dots)
        self._backend.pcg_step(
            self.x,
            self._r,
            self._p,
            ap,
            d,
            self._dots,
            state.rr,
            rz,
            state.state,
            state.threshold,
            self._maxiter,
            state.rr_out,
            rz_out,
            state.state_out,
            state.residual_sq,
        )

    def restart(self, again: Tensor, residual: Tensor) -> None:
        """Begin again at x for these systems, with no search direction kept."""
        _update(self._r, residual, again)
        _update(self._p, self._precondition(residual), again)
        rz, _ = self._current_rz()
        rz.masked_fill_(again[:, None], 0.0)
        squares = kernels.row_weighted_squares(residual, self._precondition.inverse)
        rz[:, 0] += torch.where(again, squares, 0.0)

    def _current_rz(self) -> tuple[Tensor, Tensor]:
        """Partial sums of r.z and where the next go.

        They change places with those of r.r, also where these go back because a graph failed.
        """
        first, second = self._rz
        return (first, second) if self.progress.rr is self._first_rr else (second, first)


class PreconditionedCG(Recurrence):
    """CG on A x = b for symmetric definite A and M = `precondition`, M about A^-1.

    Saad, "Iterative Methods for Sparse Linear Systems" (2nd edition, 2003), algorithm 9.1, with z
    and p taken at the start of an iteration: one product with M and one with A. It stops by the
    norm of the residual b - A x, not by r.z. M and -M give the same iterates, so that M may be
    negative definite as A may; where r.z vanishes or changes its sign M is not definite.
    """

    def __init__(
        self,
        solver: FusedSolver,
        apply: RowMatvec,
        b: Tensor,
        precondition: Callable[[Tensor], Tensor],
    ):
        if solver.backend == "triton":
            raise RuntimeError(
                "backend='triton' has no kernels for CG with a preconditioner M other than "
                "Jacobi(): use backend='auto', or another M, or leave it out."
            )
        self.apply, self.b = apply, b
        self._precondition = precondition
        self._maxiter = solver.iteration_limit(apply.layout)
        b_norm = kernels.row_norms(b)
        self.x, self._r, norm = solver.start(apply, b, b_norm)
        self._p = torch.zeros_like(b)
        self._rz = torch.ones_like(b_norm)
        tolerance = solver.tolerance(b_norm, b.dtype)
        self.progress = Progress(norm, tolerance, partials=1)

    def step(self) -> None:
        """Do one iteration on the systems that run, or stop them."""
        state, eps = self.progress, torch.finfo(self.b.dtype).eps
        rr, seen = state.rr[:, 0], state.state[0]
        z = self._precondition(self._r)
        rz = kernels.row_dots(self._r, z)
        beta = (rz / self._rz).masked_fill_(seen == codes.RUNNING, 0.0)
        definite = (rz.abs() > eps * rr.sqrt() * kernels.row_norms(z)) & (beta >= 0)
        _update(self._p, _scaled(self._p, beta).add_(z), (seen < 0) & definite)
        ap = self.apply(self._p)
        pap, ap_norm = kernels.row_dots(self._p, ap), kernels.row_norms(ap)

        positive = pap > 0
        flipped = (seen != codes.RUNNING) & (positive != (seen == codes.RUNNING_POSITIVE))
        # alpha A p would be r's size over eps: no digit of r would be left.
        negligible = pap.abs() * rr.sqrt() <= eps * rz.abs() * ap_norm
        advances = advance(
            state,
            self._maxiter,
            (codes.INDEFINITE, flipped),
            (codes.BREAKDOWN, negligible),
            (codes.PRECONDITIONER, ~definite),
            (codes.NON_FINITE, ~(rz.isfinite() & pap.isfinite() & ap_norm.isfinite())),
            running=codes.RUNNING_POSITIVE - (~positive).int(),  # one less is RUNNING_NEGATIVE
        )
        alpha = rz / pap
        _update(self.x, _scaled(self._p, alpha).add_(self.x), advances)
        _update(self._r, self._r - _scaled(ap, alpha), advances)
        torch.where(advances, rz, self._rz, out=self._rz)
        record(state, advances, kernels.row_norms(self._r).square_())

    def restart(self, again: Tensor, residual: Tensor) -> None:
        """Begin again at x for these systems, with no search direction kept."""
        _update(self._r, residual, again)
        self._p.masked_fill_(again[:, None], 0.0)


def _scaled(v: Tensor, by: Tensor) -> Tensor:
    """Scale the rows of v (B, ld) by float64 scalars (B,), rounded once.

    A product of its own, not fused into the sum that follows: torch's loops may or may not fuse, so
    that a row's bits would depend on where it lies.
    """
    return v * by.to(v.dtype)[:, None]


def _update(v: Tensor, new: Tensor, rows: Tensor) -> None:
    """Write `new` into v, (B, ld) both, where `rows` (B,) says so."""
    torch.where(rows[:, None], new, v, out=v)
