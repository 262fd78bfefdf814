"""A solver whose Solutions are shown to somebody, wherever a derivative calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch

from tritonimplicit.diagnostics import TOLD_BY, Solution, TensorTree
from tritonimplicit.linear_solve.base import LinearSolver
from tritonimplicit.linear_solve.direct import solve_directly
from tritonimplicit.linear_solve.family import OwnSolver
from tritonimplicit.operators import Matvec


@dataclass(frozen=True)
class Observed(OwnSolver):
    """`inner`, with each Solution handed to `show`; warnings say that `told_by` knows more."""

    inner: LinearSolver
    show: Callable[[Solution], None]
    told_by: str = TOLD_BY

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet, in a copy that is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, matvec: Matvec, b: TensorTree, **overrides: Any) -> TensorTree:
        """Return x with A x = b, differentiable."""
        return solve_directly(self._around(dataclasses.replace(self.inner, **overrides)), matvec, b)

    def solve_plain(self, matvec: Matvec, b: TensorTree) -> TensorTree:
        """Return x with A x = b, not differentiable, and report failures."""
        solution = self.inner.solve_and_report(matvec, b, self.told_by)
        self.show(solution)
        return solution.value

    def equation(self, matvec: Matvec, b: TensorTree) -> tuple[OwnSolver, Matvec, TensorTree]:
        """Return (solver, A, b) with the same x, with a tensor ridge and the like in A and b."""
        solver, matvec, b = self.inner.equation(matvec, b)
        return self._around(solver), matvec, b

    def open_ridge(self) -> OwnSolver:
        """Return the solver of the equation whose matrix has the ridge in it."""
        return self._around(self.inner.open_ridge())

    def without_guess(self) -> OwnSolver:
        """Return the solver for another right hand side, of which nothing is known."""
        return self._around(self.inner.without_guess())

    def transposed(self) -> OwnSolver:
        """Return the solver for another right hand side and A^T, of which nothing is known."""
        return self._around(self.inner.transposed())

    def on_leaves(self, spec: optree.PyTreeSpec) -> OwnSolver:
        """Return the solver for vectors that are tuples of the leaves of a pytree like `spec`."""
        return self._around(self.inner.on_leaves(spec))

    def vmapped(self, sizes: torch.Size) -> OwnSolver:
        """Return the solver for systems numbered by leading dimensions of these sizes too."""
        return self._around(self.inner.vmapped(sizes))

    def _around(self, inner: LinearSolver) -> Observed:
        return dataclasses.replace(self, inner=inner)
