"""The iterates on a solver's way, for those who want a few of them."""

from __future__ import annotations

from collections.abc import Iterable

import optree
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.fixed_point.base import Map


class Iterates:
    """f, keeping a copy of the z after each number of iterations in `at`.

    A solver evaluates f once at z0 and once an iteration, at the iterate itself.
    """

    def __init__(self, f: Map, at: Iterable[int]):
        self._f, self._at = f, frozenset(at)
        self._kept: dict[int, TensorTree] = {}
        self._evaluations = 0

    def __call__(self, z: TensorTree) -> TensorTree:
        """f(z)."""
        if self._evaluations in self._at:
            self._kept[self._evaluations] = optree.tree_map(Tensor.clone, z)
        self._evaluations += 1
        return self._f(z)

    def after(self, iterations: int, solution: TensorTree) -> TensorTree:
        """z after so many iterations, or the `solution` where the solver has ended before."""
        return self._kept.get(iterations, solution)
