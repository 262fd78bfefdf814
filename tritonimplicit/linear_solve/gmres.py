"""GMRES with restarts, for any nonsingular system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import build, check_choice, check_count
from tritonimplicit.linear_solve.iterative import IterativeSolver
from tritonimplicit.linear_solve.loop import Recurrence, solve_and_verify
from tritonimplicit.linear_solve.plain import (
    RowFunction,
    full_precision,
    normalised,
)
from tritonimplicit.linear_solve.preconditioners import row_preconditioner
from tritonimplicit.linear_solve.progress import Progress
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels import status as codes

_BLOCK: Final = 5
"""Vectors of the basis that are made ready, and added up in x, at once."""


@dataclass(frozen=True, kw_only=True)
class GMRES(IterativeSolver):
    """GMRES(m), m = `restart`, for any nonsingular A; (A + ridge I) x = b.

    The x of least residual in a Krylov space that grows by one matvec an iteration; after m of
    them it starts again from the true residual (one matvec more, not counted). It keeps min(m, n)
    vectors. A cycle that does not lessen the residual ends as STAGNATED: so would all after it.

    `M` approximates the inverse of A and preconditions from the right, so that residuals are those
    of A x = b.

    Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric
    linear systems", SIAM J. Sci. Stat. Comput. 7, 1986. Arnoldi's process by classical Gram-Schmidt
    done twice (Giraud, Langou, Rozloznik and van den Eshof, Numer. Math. 101, 2005), in three
    launches an iteration. `backend` is "auto" (Triton on a GPU), "reference" (plain torch) or
    "triton".
    """

    restart: int = 20
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_choice("backend", self.backend, kernels.BACKENDS)
        check_count("restart", self.restart)
        if self.restart == 0:
            raise ValueError("restart must be at least 1: it is the size of the Krylov space.")

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        precondition = row_preconditioner(self.M, apply)
        rhs = layout.gather(b, "b")
        return solve_and_verify(self, _Arnoldi(self, apply, rhs, precondition))


class _Arnoldi(Recurrence):
    """Cycles of Arnoldi's process, A M V_k = V_{k+1} H_k, that all systems begin together.

    The residual norm is told by the kernels, without the least squares problem; x follows at a
    cycle's end.
    """

    _column: int
    _norm: Tensor
    _iterations: Tensor

    def __init__(
        self, solver: GMRES, apply: RowMatvec, b: Tensor, precondition: RowFunction | None
    ):
        self.apply, self.b, self._precondition = apply, b, precondition
        self._maxiter = solver.iteration_limit(apply.layout)
        b_norm = kernels.row_norms(b)
        self.x, residual, norm = solver.start(apply, b, b_norm)
        systems, ld = b.shape
        self._backend = kernels.backend(solver.backend, b.device, b.dtype)
        partials = self._backend.partial_count(ld)
        self.progress = Progress(norm, solver.tolerance(b_norm, b.dtype), partials)
        m = max(1, min(solver.restart, apply.layout.n, self._maxiter))
        self._basis, self._ready = b.new_empty(m, systems, ld), 0
        self._rest = torch.empty_like(b)
        self._columns = b_norm.new_zeros(m + 1, systems, m + 1)  # of H, as rows, and one more
        self._left = b_norm.new_ones(systems, m + 1)  # g, with g H = 0
        self._first, self._second = b_norm.new_empty(2, m, systems, partials)
        self._rest_sq = b_norm.new_empty(systems, partials)
        self._unit = torch.eye(m + 1, dtype=torch.float64, device=b.device).roll(1, 1)
        self._numbers = torch.arange(m + 1, device=b.device)
        self._begin(residual, norm)

    def step(self) -> None:
        if self._column == len(self._basis):
            self._next_cycle()
        state, basis, j, k = self.progress, self._basis, self._column, self._column + 1
        self._make_ready(k + 1)
        q = basis[j]
        w = self.apply(q if self._precondition is None else self._precondition(q))
        run = self._backend
        run.multi_dot(w, basis, k, state.state, self._first)
        run.arnoldi_project(
            *(w, basis, k, self._first, state.state, self._rest, self._second, self._rest_sq)
        )
        run.arnoldi_step(
            *(self._rest, basis, k, self._first, self._second, self._rest_sq, self._left),
            *(self._columns[j], self._norm, state.rr, state.state, state.threshold),
            *(self._maxiter, state.rr_out, state.state_out, state.residual_sq),
        )
        self._column = k

    def restart(self, again: Tensor, residual: Tensor) -> None:
        # All begin a cycle, those that are frozen for nothing.
        self._begin(residual, kernels.row_norms(residual))

    def finish(self) -> None:
        self.x = self._updated()

    def _begin(self, residual: Tensor, norm: Tensor) -> None:
        self._column, self._norm = 0, norm
        self._iterations = self.progress.state[1].clone()
        self._make_ready(1)
        self._basis[0] = normalised(residual)[0]

    def _make_ready(self, count: int) -> None:
        """Let so many vectors, and the rest of their block, be zero where they are not written.

        A system that has stopped still reads them in `_updated`, with coefficients zero.
        """
        if count > self._ready:
            before, self._ready = self._ready, -(-count // _BLOCK) * _BLOCK
            self._basis[before : self._ready].zero_()

    def _next_cycle(self) -> None:
        """Bring x up to date, and begin a cycle from its true residual."""
        progress, before = self.progress, self.x
        rr = progress.total
        x = self._updated()
        residual = self.apply.residual(x, self.b)
        norm = kernels.row_norms(residual)
        runs = rr > progress.threshold  # one below is about to stop; a frozen one's is zero
        stalled = runs & ~(norm < self._norm)
        self.x = torch.where(stalled[:, None], before, x)
        norm = torch.where(stalled, self._norm, norm)
        progress.rr[:, 1:] = 0
        progress.rr[:, 0] = torch.where(runs, norm.square(), rr)
        progress.stop(stalled, codes.STAGNATED)
        self._begin(residual, norm)

    def _updated(self) -> Tensor:
        """x of each system, of least residual in the Krylov space of its steps in this cycle."""
        steps = self.progress.state[1] - self._iterations
        left = self._numbers >= steps[:, None]  # (B, m + 1) those not taken
        # Unit columns, in rows where those taken are zero, leave the least squares problem alone.
        # Its size is the same whenever a system stops, and so are its bits. The last one is the
        # right hand side's, which R then holds as Q has transformed it.
        columns = torch.where(left[:, :, None], self._unit, self._columns.transpose(0, 1))
        r = torch.linalg.qr(columns.mT, mode="r").R
        rhs = r[:, :-1, -1:] * self._norm[:, None, None]
        y = torch.linalg.solve_triangular(r[:, :-1, :-1], rhs, upper=True)[:, :, 0]
        step = self._combination(y.masked_fill_(left[:, :-1], 0.0).to(self.x.dtype))
        if self._precondition is not None:
            step = self._precondition(step)
        x = self.x + step
        return torch.where(left[:, :1], self.x, x, out=x)

    def _combination(self, y: Tensor) -> Tensor:
        """Return the sum over j of y[:, j] basis[j], for y (B, m) zero beyond this cycle.

        By blocks, so that those of no step of this cycle need not be read, and a system's bits do
        not depend on how many steps others have taken.
        """
        step = torch.zeros_like(self.x)
        with full_precision(self.b.device):
            for start in range(0, self._column, _BLOCK):
                block = slice(start, start + _BLOCK)
                vectors = self._basis[block].transpose(0, 1)
                step.unsqueeze(1).baddbmm_(y[:, None, block], vectors)
        return step


def solve_gmres(
    *, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any
) -> GMRES:
    """Return a GMRES solver, `(matvec, b) -> x`; `fields` are those of `GMRES`.

    `matvec` and `b` are accepted and not used, as by `solve_cg`.
    """
    return build(GMRES, fields)
