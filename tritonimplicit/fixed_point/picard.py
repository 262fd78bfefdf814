"""Picard's iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tritonimplicit.fixed_point.base import FixedPointSolver
from tritonimplicit.fixed_point.iteration import Evaluations, Iteration, Successive


@dataclass(frozen=True, kw_only=True)
class Picard(FixedPointSolver):
    """z <- f(z), which converges where f is a contraction, and keeps no vectors besides z."""

    def _iteration(self, f: Evaluations, z: Tensor) -> Iteration:
        return _Plain(self, f, z)


class _Plain(Successive):
    def _next(self) -> Tensor:
        return self._f.image
