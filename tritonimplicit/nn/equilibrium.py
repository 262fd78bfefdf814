"""The fixed point of one forward pass: how to find it, and what became of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import optree
from torch import Tensor

from tritonimplicit.diagnostics import Solution, Status, TensorTree
from tritonimplicit.diff.implicit.fixed_point import custom_fixed_point
from tritonimplicit.fixed_point import FixedPointSolver
from tritonimplicit.fixed_point.base import ADVICE, Map
from tritonimplicit.fixed_point.iterates import Iterates
from tritonimplicit.nn.fixed_layer import FixedLayer, LayerTensors
from tritonimplicit.nn.stability import spectral_radius
from tritonimplicit.nn.warm_start import Starts
from tritonimplicit.operators import Solve


@dataclass
class Equilibrium:
    """What became of the last forward pass of a DEQ, and of its backward pass.

    `forward` is the Solution of z = f(z). `backward` is that of the linear system of the backward
    pass: None before it, and where the gradient needs none; the last, if there were several.
    """

    forward: Solution | None = None
    backward: Solution | None = None
    _f: FixedLayer | None = field(default=None, repr=False)
    _tensors: Any = field(default=None, repr=False)

    def spectral_radius(self, steps: int = 30, batch_ndim: int = 1) -> Tensor:
        """Estimate the largest |eigenvalue| of df/dz at z, for each sample: `steps` vjps.

        See `nn.spectral_radius`. Raises RuntimeError if there was no forward pass.
        """
        f, tensors = self._f, self._tensors
        if f is None or self.forward is None:
            raise RuntimeError("there was no forward pass to tell the spectral radius of.")
        return spectral_radius(
            lambda z: f(z, tensors), self.forward.value, steps=steps, batch_ndim=batch_ndim
        )

    def show_backward(self, solution: Solution) -> None:
        """Take in a Solution of the backward pass."""
        self.backward = solution


Search: TypeAlias = Callable[[Map, TensorTree], Solution]
"""(f, z0) -> the Solution of z = f(z)."""


@dataclass(frozen=True)
class Problem:
    """z = f(z, tensors), to be solved from z0; `last` is told what became of it.

    `starts` are the warm starts of the samples, if there are any. The iterates after the numbers of
    iterations in `corrections` are put into `iterates`.
    """

    f: FixedLayer
    tensors: LayerTensors
    z0: TensorTree
    solver: FixedPointSolver
    last: Equilibrium
    starts: Starts | None = None
    corrections: tuple[int, ...] = ()
    iterates: list[TensorTree] = field(default_factory=list)

    def root(
        self,
        solve: Solve | None = None,
        search: Search | None = None,
        advice: Mapping[Status, str] = ADVICE,
    ) -> TensorTree:
        """Return the fixed point with its implicit gradient, by `solve` of I - J^T.

        `search` finds it, by default the solver, and `advice` is for where it does not.
        """
        # What the graph holds must hold no tensors: those it gets as arguments.
        f, solver, last = self.f, self.solver, self.last
        search = solver.solve if search is None else search
        corrections, iterates = self.corrections, self.iterates

        def find(z0: TensorTree, tensors: LayerTensors) -> TensorTree:
            fixed = Iterates(lambda z: f(z, tensors), corrections)
            solution = search(fixed, z0)
            # A copy: the caller may change z in place.
            copied = optree.tree_map(Tensor.clone, solution.value)
            last.forward = dataclasses.replace(solution, value=copied)
            iterates.extend(fixed.after(k, copied) for k in corrections)
            solver.report(solution, told_by="`deq.last.forward`", advice=advice)
            return solution.value

        given: Any = self.tensors
        leaves = optree.tree_leaves(given)
        if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            return find(self.z0, self.tensors)  # which custom_fixed_point refuses
        return custom_fixed_point(f.__call__, argnums=1, solve=solve)(find)(self.z0, self.tensors)

    def iterate(self, z: TensorTree, steps: int, damping: float) -> TensorTree:
        """Do z <- (1 - damping) z + damping f(z) some times, recorded by autograd."""

        def moved(z: Tensor, image: Tensor) -> Tensor:
            return z + damping * (image - z)

        for _ in range(steps):
            z = optree.tree_map(moved, z, self.f(z, self.tensors))
        return z
