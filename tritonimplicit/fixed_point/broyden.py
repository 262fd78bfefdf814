"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import Solution, TensorTree
from tritonimplicit.fixed_point.base import FixedPointSolver, Map
from tritonimplicit.fixed_point.iteration import Evaluations, Iteration, Successive
from tritonimplicit.linear_solve.base import check_choice, check_count
from tritonimplicit.linear_solve.plain import column, full_precision, normalised
from tritonimplicit.vectors import Layout


@dataclass(frozen=True, kw_only=True)
class Broyden(FixedPointSolver):
    """Broyden's quasi-Newton method for r(z) = f(z) - z = 0, for each sample by itself.

    z <- z - H r, H an approximation of the inverse Jacobian of r: -I at first, then a rank-one
    update a step. The "good" one changes the approximate Jacobian least, the "bad" one its inverse.
    It keeps `memory` updates, two vectors each, and begins again at H = -I when they are full.
    `backend` is "auto" (Triton on a GPU), "reference" (plain torch) or "triton".

    Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19,
    1965; Kelley, "Iterative Methods for Linear and Nonlinear Equations", SIAM, 1995, chapter 7.
    """

    memory: int = 20
    update: str = "good"
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_choice("backend", self.backend, kernels.BACKENDS)
        check_count("memory", self.memory)
        if self.memory == 0:
            raise ValueError("memory must be at least 1: with no updates there is Picard.")
        check_choice("update", self.update, ("good", "bad"))

    def solve_with_inverse(self, f: Map, z0: TensorTree) -> tuple[Solution, InverseJacobian]:
        """`solve`, and (I - df/dz)^-1 as the method has come to know it on its way."""
        solution, iteration = self._solve(f, z0)
        assert isinstance(iteration, _QuasiNewton)
        return solution, iteration.inverse()

    def _iteration(self, f: Evaluations, z: Tensor) -> Iteration:
        return _QuasiNewton(self, f, z)


@dataclass(frozen=True)
class InverseJacobian:
    """v -> (I - J)^-1 v on pytrees like z, about: v - left right^T v, J the Jacobian df/dz.

    `left` and `right` are (k, B, ld), k rank-one updates. For a sample of which the method knows
    nothing, because it met NaN or infinity or has just begun again, that is v itself.
    """

    layout: Layout
    left: Tensor
    right: Tensor

    def __call__(self, v: TensorTree) -> TensorTree:
        """(I - J)^-1 v."""
        rows = self.layout.flatten(v, "v")
        return self.layout.unflatten(rows - _low_rank(self.left, self.right, rows))

    @property
    def T(self) -> InverseJacobian:
        """u -> (I - J)^-T u."""
        return InverseJacobian(self.layout, self.right, self.left)


class _QuasiNewton(Successive):
    """H = -I + sum over j of _left[j] _right[j]^T; a frozen sample's stays as it is."""

    def __init__(self, solver: Broyden, f: Evaluations, z: Tensor):
        super().__init__(solver, f, z)
        self._good = solver.update == "good"
        memory = max(1, min(solver.memory, solver.maxiter))
        samples, ld = z.shape
        self._backend = kernels.backend(solver.backend, z.device, z.dtype)
        partials = self._backend.partial_count(ld)
        self._left = z.new_zeros(memory, samples, ld)
        self._right = torch.zeros_like(self._left)
        self._products = z.new_empty(memory, samples, partials, dtype=torch.float64)
        self._coefficients = self._products.new_zeros(samples, memory)
        self._zero = torch.zeros_like(z)
        self._count = self._most = 0  # updates since the last beginning, and ever
        self._before: tuple[Tensor, Tensor, Tensor] | None = None  # z, r and -H r

    def inverse(self) -> InverseJacobian:
        """-H, of the samples whose updates are finite."""
        k = self._most
        finite = [t[:k].isfinite().all(2).all(0) for t in (self._left, self._right)]
        known = (finite[0] & finite[1])[:, None]
        left, right = (torch.where(known, t[:k], 0.0) for t in (self._left, self._right))
        return InverseJacobian(self._f.layout, left, right)

    def _next(self) -> Tensor:
        if self._before is not None and self._count == len(self._left):
            self._begin_again(*self._before[:2])
        step = self._product(self._left, self._right, self.residual)
        if self._before is not None:
            step = self._update(step, *self._before)
        self._before = self.z, self.residual, step
        return self._rounded(self.z + step)

    def _begin_again(self, z: Tensor, residual: Tensor) -> None:
        """H = -I for the samples that run."""
        runs = (self.progress.state_out[0] < 0)[:, None]
        for vectors in (self._left, self._right):
            vectors.masked_fill_(runs, 0.0)
        self._count, self._before = 0, (z, residual, residual)

    def _update(self, step: Tensor, z: Tensor, residual: Tensor, step_before: Tensor) -> Tensor:
        """Make H y = s, s the last step and y the change of the residual; return -H r.

        `step` is -H r before that, `step_before` -H times the last `residual`: H y is their
        difference, and costs no product.
        """
        j, s, y = self._count, self.z - z, self.residual - residual
        # A unit vector, so that no product of two vectors overflows; `left` turns with its sign.
        right, _ = normalised(self._product(self._right, self._left, s) if self._good else y)
        lack = (s - step_before).add_(step)
        denominator = kernels.row_dots(right, y)
        # No update where it has no direction: the secant is already met, or cannot be.
        left = lack / column(denominator, lack.dtype)
        usable, runs = (denominator != 0)[:, None], (self.progress.state_out[0] < 0)[:, None]
        for kept, update in ((self._left[j], left), (self._right[j], right)):
            torch.where(runs, torch.where(usable, update, 0.0), kept, out=kept)
        self._count = j + 1
        self._most = max(self._most, self._count)
        along = kernels.row_dots(self._right[j], self.residual)
        return step - self._left[j] * column(along, step.dtype)

    def _product(self, left: Tensor, right: Tensor, v: Tensor) -> Tensor:
        """-H v, or with left and right exchanged -H^T v; anything for a frozen sample."""
        k = self._count
        if k == 0:
            return v
        state, out = self.progress.state_out, torch.empty_like(v)
        self._backend.multi_dot(v, right, k, state, self._products)
        self._coefficients[:, :k] = self._products[:k].sum(-1).T
        mix = self._backend.anderson_mix
        mix(self._zero, v, left, self._coefficients, k, 1.0, state, out)
        return out


def _low_rank(left: Tensor, right: Tensor, v: Tensor) -> Tensor:
    """left right^T v: (k, B, ld), (k, B, ld), (B, ld) -> (B, ld)."""
    with full_precision(v.device):
        coefficients = torch.bmm(v[:, None], right.permute(1, 2, 0))
        return torch.bmm(coefficients, left.transpose(0, 1))[:, 0]
