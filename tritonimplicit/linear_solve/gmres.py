"""GMRES with restarts, for any nonsingular system."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import build, check_count
from tritonimplicit.linear_solve.iterative import IterativeSolver
from tritonimplicit.linear_solve.loop import Recurrence, solve_and_verify
from tritonimplicit.linear_solve.plain import (
    RowFunction,
    advance,
    column,
    full_precision,
    kept,
    normalised,
    record,
    scaled,
)
from tritonimplicit.linear_solve.preconditioners import row_preconditioner
from tritonimplicit.linear_solve.progress import Progress
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels import status as codes


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
    done twice (Giraud, Langou, Rozloznik and van den Eshof, Numer. Math. 101, 2005).
    """

    restart: int = 20

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_count("restart", self.restart)
        if self.restart == 0:
            raise ValueError("restart must be at least 1: it is the size of the Krylov space.")

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        precondition = row_preconditioner(self.M, apply)
        rhs = layout.gather(b, layout.zeros, "b")
        return solve_and_verify(self, _Arnoldi(self, apply, rhs, precondition))


class _Arnoldi(Recurrence):
    """Cycles of Arnoldi's process, A M V_k = V_{k+1} H_k, that all systems begin together.

    The residual norm is told without the least squares problem by the left null vector g of H_k,
    g H_k = 0 with g_0 = 1: it is β / ‖g‖, β that of the cycle's start (Ayachour, "A fast
    implementation for GMRES method", J. Comput. Appl. Math. 159, 2003). x follows at a cycle's end.
    """

    _column: int
    _norm: Tensor
    _left_sq: Tensor
    _iterations: Tensor

    def __init__(
        self, solver: GMRES, apply: RowMatvec, b: Tensor, precondition: RowFunction | None
    ):
        self.apply, self.b, self._precondition = apply, b, precondition
        self._maxiter = solver.iteration_limit(apply.layout)
        self._negligible = (10 * torch.finfo(b.dtype).eps) ** 2
        b_norm = kernels.row_norms(b)
        self.x, residual = solver.start(apply, b, b_norm)
        norm = kernels.row_norms(residual)
        self.progress = Progress(norm, solver.tolerance(b_norm, b.dtype), partials=1)
        systems, ld = b.shape
        m = max(1, min(solver.restart, apply.layout.n, self._maxiter))
        # Zeros: a system that stops early still reads all of its basis, with coefficients zero.
        self._basis = b.new_zeros(m, systems, ld)
        self._columns = b_norm.new_zeros(systems, m, m + 1)  # of H, as rows
        self._left = b_norm.new_ones(systems, m + 1)  # g
        self._unit = torch.eye(m, m + 1, dtype=torch.float64, device=b.device).roll(1, 1)
        self._numbers = torch.arange(m, device=b.device)
        self._stalled = torch.zeros_like(norm, dtype=torch.bool)
        self._begin(residual, norm)

    def step(self) -> None:
        state, j = self.progress, self._column
        if j == len(self._basis):
            self._next_cycle()
            j = 0
        q = self._basis[j]
        w, scale = scaled(self.apply(q if self._precondition is None else self._precondition(q)))
        w, h = _orthogonalised(w, self._basis[: j + 1])
        norm = kernels.row_norms(w)  # of what the basis lacks; (scale h, scale norm) is H's column
        dot = (self._left[:, : j + 1] * h).sum(1)
        norm_sq, negligible = norm.square(), self._negligible
        size_sq = h.square().sum(1) + norm_sq
        closed = norm_sq <= negligible * size_sq  # the Krylov space is invariant
        singular = closed & (dot.square() <= negligible * size_sq * self._left_sq)
        advances = advance(
            state,
            self._maxiter,
            (codes.STAGNATED, self._stalled),
            (codes.BREAKDOWN, singular),
            (codes.NON_FINITE, ~(scale < math.inf)[:, 0]),
        )
        self._left[:, j + 1] = g = -dot / norm
        self._left_sq = self._left_sq + g.square()
        # The exact solution is in an invariant space: that is a claim, and the truth will tell.
        record(state, advances, (self._norm.square() / self._left_sq).masked_fill(closed, 0.0))
        torch.mul(h, scale, out=self._columns[:, j, : j + 1])
        torch.mul(norm, scale[:, 0], out=self._columns[:, j, j + 1])
        self._column = j + 1
        if self._column < len(self._basis):
            following = torch.div(w, column(norm, w.dtype), out=self._basis[self._column])
            kept(following, advances & ~closed)

    def restart(self, again: Tensor, residual: Tensor) -> None:
        # All begin a cycle, those that are frozen for nothing.
        self._begin(residual, kernels.row_norms(residual))

    def finish(self) -> None:
        self.x = self._updated()

    def _begin(self, residual: Tensor, norm: Tensor) -> None:
        self._column, self._norm = 0, norm
        self._iterations = self.progress.state[1].clone()
        self._left_sq = torch.ones_like(norm)
        self._basis[0] = normalised(residual)[0]

    def _next_cycle(self) -> None:
        """Bring x up to date, and begin a cycle from its true residual."""
        before, rr = self.x, self.progress.rr[:, 0]
        x = self._updated()
        residual = self.apply.residual(x, self.b)
        norm = kernels.row_norms(residual)
        runs = rr > self.progress.threshold  # one below is about to stop; a frozen one's is zero
        self._stalled = runs & ~(norm < self._norm)
        self.x = torch.where(self._stalled[:, None], before, x)
        norm = torch.where(self._stalled, self._norm, norm)
        torch.where(runs, norm.square(), rr, out=rr)
        self._begin(residual, norm)

    def _updated(self) -> Tensor:
        """x of each system, of least residual in the Krylov space of its steps in this cycle."""
        taken = self._numbers < (self.progress.state[1] - self._iterations)[:, None]  # (B, m)
        # Unit columns, in rows where those taken are zero, leave the least squares problem alone.
        # Its size is the same whenever a system stops, and so are its bits.
        columns = torch.where(taken[:, :, None], self._columns, self._unit)
        q, r = torch.linalg.qr(columns.mT)
        rhs = q[:, 0, :, None] * self._norm[:, None, None]
        y = torch.linalg.solve_triangular(r, rhs, upper=True)[:, :, 0]
        y = torch.where(taken, y, 0.0).to(self.x.dtype)
        with full_precision(self.b.device):
            step = torch.bmm(y[:, None], self._basis.transpose(0, 1))[:, 0]
        if self._precondition is not None:
            step = self._precondition(step)
        return torch.where(taken[:, :1], self.x + step, self.x)


def _orthogonalised(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return w (B, ld) less its part in a basis (k, B, ld), and that part's coefficients (B, k)."""
    vectors = basis.transpose(0, 1)
    with full_precision(w.device):
        rest = w[:, None]  # as a row: the product with a column is many times slower
        h = torch.bmm(rest, vectors.mT)
        rest = torch.baddbmm(rest, h, vectors, alpha=-1)
        more = torch.bmm(rest, vectors.mT)
        rest = torch.baddbmm(rest, more, vectors, alpha=-1)
    return rest[:, 0], (h.double() + more)[:, 0]


def solve_gmres(
    *, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any
) -> GMRES:
    """Return a GMRES solver, `(matvec, b) -> x`; `fields` are those of `GMRES`.

    `matvec` and `b` are accepted and not used, as by `solve_cg`.
    """
    return build(GMRES, fields)
