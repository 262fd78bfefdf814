"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.fixed_point.base import FixedPointSolver
from tritonimplicit.fixed_point.iteration import Evaluations, Iteration
from tritonimplicit.linear_solve.base import check_choice, check_count, check_real


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration of z <- f(z) by the last m + 1 iterates, for each sample by itself.

    With r = f(z) - z, and the columns of dZ and dR the last m differences of iterates and of their
    residuals, z <- z + beta r - (dZ + beta dR) c, c that of least ‖r - dR c‖. On a linear map of
    dimension m that is GMRES. It keeps 2 m vectors. The least squares problem is solved by normal
    equations of unit columns in float64, with a ridge at the rounding level of the vectors.
    `backend` is "auto" (Triton on a GPU), "reference" (plain torch) or "triton".

    Anderson, "Iterative procedures for nonlinear integral equations", J. ACM 12, 1965; in the form
    of Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49,
    2011.
    """

    m: int = 5
    beta: float = 1.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_choice("backend", self.backend, kernels.BACKENDS)
        check_count("m", self.m)
        if self.m == 0:
            raise ValueError("m must be at least 1: with no differences there is Picard.")
        check_real("beta", self.beta)
        if self.beta == 0:
            raise ValueError("beta must not be zero: z would stay in the span of its differences.")

    def _iteration(self, f: Evaluations, z: Tensor) -> Iteration:
        return _Mixing(self, f, z)


class _Mixing(Iteration):
    """`_residuals[j]` is a column of dR, `_moves[j]` that of dZ + beta dR; `_gram` is dR^T dR."""

    def __init__(self, solver: Anderson, f: Evaluations, z: Tensor):
        self._beta = float(solver.beta)
        m = max(1, min(solver.m, solver.maxiter - 1))
        samples, ld = z.shape
        self._backend = kernels.backend(solver.backend, z.device, z.dtype)
        partials = self._backend.partial_count(ld)
        self._residuals = z.new_zeros(m, samples, ld)
        self._moves = torch.zeros_like(self._residuals)
        self._gram = z.new_zeros(samples, m, m, dtype=torch.float64)
        self._row, self._products = self._gram.new_empty(2, m, samples, partials)
        self._squares = self._gram.new_empty(2, samples, partials)
        self._coefficients = self._gram.new_zeros(samples, m)
        self._ridge = torch.finfo(z.dtype).eps * torch.eye(m, dtype=torch.float64, device=z.device)
        self._count = 0
        self._before: Tensor | None = None
        super().__init__(solver, f, z)

    def _move(self, advances: Tensor) -> None:
        k = min(self._count, len(self._moves))
        if k:
            self._coefficients[:, :k] = self._least_squares(k)
        # What was before the last z is needed no more: its memory takes the next.
        following = torch.empty_like(self.z) if self._before is None else self._before
        self._backend.anderson_mix(
            *(self.z, self.residual, self._moves, self._coefficients),
            max(k, 1),
            self._beta,
            *(self.progress.state_out, following),
        )
        self._before, self.z = self.z, self._rounded(following)

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        if self._before is None:
            return super()._evaluate()
        slot, self._count = self._count % len(self._moves), self._count + 1
        k = min(self._count, len(self._moves))
        self._backend.anderson_dots(
            *(self._f(self.z), self.z, self._before, self.residual, self._residuals, self._moves),
            slot,
            k,
            self._beta,
            *(self.progress.state_out, self._row, self._products, self._squares),
        )
        self._gram[:, slot, :k] = self._gram[:, :k, slot] = self._row[:k].sum(-1).T
        norm, image_norm = self._squares.sum(-1).sqrt_()
        return norm, self._tolerance(image_norm)

    def _least_squares(self, k: int) -> Tensor:
        """The c of least ‖r - dR c‖, (B, k), by normal equations of unit columns."""
        gram = self._gram[:, :k, :k]
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()  # (B, k)
        norms.masked_fill_(norms == 0, 1.0)
        matrix = gram / (norms[:, :, None] * norms[:, None, :]) + self._ridge[:k, :k]
        rhs = self._products[:k].sum(-1).T / norms
        return _positive_solve(matrix, rhs[:, :, None])[:, :, 0] / norms


def _positive_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve small positive definite systems, (B, k, k) and (B, k, 1), the host asking nothing.

    Zero where a matrix is not: the step is then a plain one.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(rhs, factor)
    return torch.where((info == 0)[:, None, None], solution, 0.0)
