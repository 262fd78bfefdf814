"""What a differentiable solve is of: a family of linear maps, and a solver."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_operator import LinearMap, add_scaled
from tritonimplicit.linear_solve.graphs import stream_for_graphs
from tritonimplicit.operators import Jacobian, Matvec, ResidualFn, Solve, Tensors
from tritonimplicit.torch_internals import has_derivative

Dims: TypeAlias = tuple[int | None, ...]


class OwnSolver(abc.ABC):
    """What derivatives ask of a solver of this library; the fields are `LinearSolver`'s."""

    batch_ndim: int
    ridge: float | Tensor | None
    symmetric: ClassVar[bool]
    """Whether the method takes A for symmetric, so that it stands for its transpose too."""

    @abc.abstractmethod
    def __call__(self, matvec: Matvec, b: TensorTree, **overrides: Any) -> TensorTree:
        """Return x with A x = b, differentiable."""

    @abc.abstractmethod
    def solve_plain(self, matvec: Matvec, b: TensorTree) -> TensorTree:
        """Return x with A x = b, not differentiable, and report failures."""

    @abc.abstractmethod
    def equation(self, matvec: Matvec, b: TensorTree) -> tuple[OwnSolver, Matvec, TensorTree]:
        """Return (solver, A, b) with the same x, with a tensor ridge and the like in A and b.

        Derivatives are taken of this equation.
        """

    @abc.abstractmethod
    def open_ridge(self) -> OwnSolver:
        """Return the solver of the equation whose matrix has the ridge in it."""

    @abc.abstractmethod
    def without_guess(self) -> OwnSolver:
        """Return the solver for another right hand side, of which nothing is known."""

    @abc.abstractmethod
    def transposed(self) -> OwnSolver:
        """Return the solver for another right hand side and A^T, of which nothing is known."""

    @abc.abstractmethod
    def on_leaves(self, spec: optree.PyTreeSpec) -> OwnSolver:
        """Return the solver for vectors that are tuples of the leaves of a pytree like `spec`."""

    @abc.abstractmethod
    def vmapped(self, sizes: torch.Size) -> OwnSolver:
        """Return the solver for systems numbered by leading dimensions of these sizes too."""


@dataclass(frozen=True)
class LinearFamily:
    """The linear maps A(x, args) = d fn / d x, and what solves with one; holds no tensors.

    `depth` counts the batch dimensions that vmap has put in front of every tensor. `linear` says
    that fn is linear in x, so that A v is fn(v, args), and `symmetric` that A is.
    """

    fn: ResidualFn
    solver: Solve
    depth: int = 0
    linear: bool = False
    symmetric: bool = False
    positive_definite: bool = False

    def recorded(self, x: Tensors, args: Tensors, wrt: Sequence[int] = ()) -> Jacobian:
        """Return A(x, args), from one evaluation of fn."""
        return Jacobian(self.fn, x, args, wrt, self._symmetric)

    def operator(self, x: Tensors, args: Tensors, transpose: bool) -> Matvec:
        """Return A(x, args), or its transpose."""
        a: Jacobian | LinearMap
        if self.linear:
            a = LinearMap(self.fn, x, args, self._symmetric, self.positive_definite)
        else:
            a = self.recorded(x, args)
        return a.T if transpose else a

    @property
    def _symmetric(self) -> bool:
        return self.symmetric or (isinstance(self.solver, OwnSolver) and self.solver.symmetric)

    def solve(self, matvec: Matvec, b: Tensors, init: Tensors = ()) -> Tensors:
        """Return u with A u = b, systems of a vmap each by itself where the solver is ours.

        Another solver gets them as one system, whose blocks do not mix. Raises TypeError or
        ValueError for a solver that returns something else than tensors shaped as b.
        """
        solver = self.solver
        if self.depth and isinstance(solver, OwnSolver):
            solver = solver.vmapped(b[0].shape[: self.depth])
        overrides = {"init": init} if init else {}
        return _checked(solver(matvec, b, **overrides), b)

    def stream(self, device: torch.device) -> AbstractContextManager[None]:
        """Where to record and solve."""
        return stream_for_graphs(getattr(self.solver, "cuda_graph", False), device)

    def vmapped(self, args_dims: Dims) -> LinearFamily:
        """Return the family over a new leading dimension of x, and of the args where not None."""
        fn = torch.vmap(self.fn, in_dims=(0, args_dims), randomness="same")
        return dataclasses.replace(self, fn=fn, depth=self.depth + 1)

    def without_guess(self) -> LinearFamily:
        """Return the family with a solver that starts from zero."""
        if not isinstance(self.solver, OwnSolver):
            return self
        return dataclasses.replace(self, solver=self.solver.without_guess())

    def flipped(self) -> LinearFamily:
        """Return the family with the solver for the other transpose."""
        if not isinstance(self.solver, OwnSolver):
            return self
        return dataclasses.replace(self, solver=self.solver.transposed())

    def with_ridge_open(self, args: Tensors) -> tuple[LinearFamily, Tensors]:
        """Return the family and the args with a ridge that is differentiated among the args."""
        solver = self.solver
        ridge = solver.ridge if isinstance(solver, OwnSolver) else None
        if not (isinstance(ridge, Tensor) and has_derivative(ridge)):
            return self, args
        assert isinstance(solver, OwnSolver)
        fn, opened, batch_ndim = self.fn, solver.open_ridge(), self.depth + solver.batch_ndim

        def shifted_fn(x: Tensors, args: Tensors) -> Tensors:
            return add_scaled(fn(x, args[:-1]), x, args[-1], batch_ndim)

        return dataclasses.replace(self, fn=shifted_fn, solver=opened), (*args, ridge)


def _checked(u: object, b: Tensors) -> Tensors:
    if not isinstance(u, tuple) or len(u) != len(b):
        raise TypeError(
            f"solve(matvec, b) must return a tuple of {len(b)} tensors, shaped as b; it returned "
            f"{type(u).__name__}."
        )
    for got, like in zip(u, b, strict=True):
        if not isinstance(got, Tensor) or got.shape != like.shape or got.dtype != like.dtype:
            shown = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise ValueError(
                f"solve(matvec, b) must return tensors like b's {like.dtype} {tuple(like.shape)}; "
                f"it returned {shown}."
            )
    return u
