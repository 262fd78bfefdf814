"""Picard's iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tritonimplicit.fixed_point.base import FixedPointSolver
from tritonimplicit.fixed_point.iteration import Iteration, Successive
from tritonimplicit.linear_solve.rows import RowMatvec


@dataclass(frozen=True, kw_only=True)
class Picard(FixedPointSolver):
    """z <- f(z), which converges where f is a contraction, and keeps no vectors besides z."""

    def _iteration(self, f: RowMatvec, z: Tensor) -> Iteration:
        return _Plain(self, f, z)


class _Plain(Successive):
    def _next(self) -> Tensor:
        return self.z + self.residual
