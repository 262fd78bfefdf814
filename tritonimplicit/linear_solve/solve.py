"""The differentiable linear solve: each of its derivatives is another solve."""

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
from tritonimplicit.opaque import opaque_call
from tritonimplicit.operators import (
    Jacobian,
    Matvec,
    ResidualFn,
    Solve,
    Tensors,
    pullback,
    pushforward,
)
from tritonimplicit.torch_internals import (
    forward_rule,
    has_derivative,
    in_trace,
    refuse_legacy_batched,
    untraced,
)

MaybeTensors: TypeAlias = tuple[Tensor | None, ...]
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


def linear_solve(
    family: LinearFamily,
    x: Tensors,
    args: Tensors,
    b: Tensors,
    transpose: bool,
    init: Tensors = (),
) -> Tensors:
    """Return u with A(x, args) u = b, or A^T u = b; differentiable in x, args and b, to any order.

    Also in the solver's ridge. `init` is an initial guess. Good under every torch.func transform; a
    vmap is one batched solve. The derivatives hold as far as the solve does: they take its result
    for the solution of the equation.
    """
    family, args = family.with_ridge_open(args)
    flat = (*x, *args, *b, *init)
    counts = len(x), len(args)
    u: Tensors = _LinearSolve.apply(family, transpose, counts, *flat)  # type: ignore[no-untyped-call]
    return u


def guess_of(solver: object) -> TensorTree:
    """Return the initial guess among a solver's fields, if it has such a field."""
    return getattr(solver, "init", None)


def replace_at(tensors: Sequence[Any], positions: Sequence[int], new: Sequence[Any]) -> Any:
    """Return the tuple `tensors` with `new` in these positions."""
    replaced = list(tensors)
    for position, tensor in zip(positions, new, strict=True):
        replaced[position] = tensor
    return tuple(replaced)


def batch_first(tensors: Sequence[Tensor], dims: Dims) -> list[Tensor]:
    """Move each vmapped dimension to the front."""
    return [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]


class _LinearSolve(torch.autograd.Function):
    """(x, args, b, init) -> u, flat; `counts` are those of x, which is also b's, and of args.

    With a jvp and a vmap rule, `forward` always runs on plain tensors, whatever the transforms: the
    map is recorded once by autograd and replayed, and the solver may look at values. The rules use
    reverse mode and this Function alone, so they hold at every level.
    """

    @staticmethod
    @untraced
    def forward(
        family: LinearFamily, transpose: bool, counts: tuple[int, int], *flat: Tensor
    ) -> Tensors:
        n = counts[0]
        where = sum(counts)

        def solve(flat: Sequence[Tensor]) -> Tensors:
            x, args, b, init = _split(tuple(flat), counts)
            with family.stream(b[0].device):
                u = family.solve(family.operator(x, args, transpose), b, init)
            # A solver may return b itself, which autograd takes for an input, not for an output.
            return tuple(t.clone() if any(t is one for one in b) else t for t in u)

        def like(flat: Sequence[Tensor]) -> Sequence[Tensor]:
            return flat[where : where + n]

        return opaque_call(solve, like, flat) if in_trace() else solve(flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        family, ctx.transpose, ctx.counts, *flat = inputs
        ctx.family = family.without_guess()  # which is one for this b
        given = flat[: sum(ctx.counts)]
        ctx.save_for_backward(*given, *output)
        ctx.save_for_forward(*given, *output)

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        refuse_legacy_batched(cotangents)
        family, transpose, n = ctx.family, ctx.transpose, ctx.counts[0]
        given, u = ctx.saved_tensors[:-n], ctx.saved_tensors[-n:]
        w = linear_solve(family.flipped(), given[:n], given[n:], cotangents, not transpose)
        needed = ctx.needs_input_grad[3:]
        wanted = [i for i in range(len(given)) if needed[i]]
        grads: MaybeTensors = (None,) * len(given)
        if wanted:
            # u = A^-1 b: its variation by x and args is -A^-1 (dA u), so the gradient is that of
            # -<w, A u>. As <left, A^T right> for either transpose, reverse mode alone is enough.
            left, right = (w, u) if transpose else (u, w)

            def product(*some: Tensor) -> Tensors:
                tensors = replace_at(given, wanted, some)
                return pullback(lambda *x: family.fn(x, tensors[n:]), *tensors[:n])(right)

            pull = pullback(product, *(given[i] for i in wanted))
            grads = replace_at(grads, wanted, pull(tuple(-t for t in left)))
        guesses = len(needed) - len(given) - n
        return (None, None, None, *grads, *w, *(None,) * guesses)

    @staticmethod
    @untraced
    @forward_rule
    def jvp(ctx: Any, saved: Tensors, *tangents: Any) -> Tensors:
        family, transpose, n = ctx.family, ctx.transpose, ctx.counts[0]
        given, u, dots = saved[:-n], saved[-n:], tangents[3:]
        db = dots[len(given) : len(given) + n]
        rhs = tuple(
            torch.zeros_like(t) if dot is None else dot for dot, t in zip(db, u, strict=True)
        )
        moving = [i for i in range(len(given)) if dots[i] is not None]
        if moving:  # A du = db - dA u

            def product(*some: Tensor) -> Tensors:
                tensors = replace_at(given, moving, some)
                x, args = tensors[:n], tensors[n:]
                if transpose:
                    return pullback(lambda *x: family.fn(x, args), *x)(u)
                return pushforward(lambda *x: family.fn(x, args), x, u)

            primals, directions = [given[i] for i in moving], [dots[i] for i in moving]
            moved = pushforward(product, primals, directions)
            rhs = tuple(dot - change for dot, change in zip(rhs, moved, strict=True))
        return linear_solve(family, given[:n], given[n:], rhs, transpose)

    @staticmethod
    @untraced
    def vmap(
        info: Any,
        in_dims: Dims,
        family: LinearFamily,
        transpose: bool,
        counts: tuple[int, int],
        *flat: Tensor,
    ) -> tuple[Tensors, Dims]:
        n, dims = counts[0], in_dims[3:]
        tensors = batch_first(flat, dims)
        for i in (*range(n), *range(sum(counts), len(flat))):
            # x, b and init always have the new dimension; forward AD refuses expanded ones.
            if dims[i] is None:
                tensors[i] = tensors[i].expand(info.batch_size, *tensors[i].shape).contiguous()
        args_dims = tuple(None if dim is None else 0 for dim in dims[n : sum(counts)])
        x, args, b, init = _split(tuple(tensors), counts)
        return linear_solve(family.vmapped(args_dims), x, args, b, transpose, init), (0,) * n


def _split(flat: Tensors, counts: tuple[int, int]) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """(x, args, b, init)."""
    n, end = counts[0], sum(counts)
    return flat[:n], flat[n:end], flat[end : end + n], flat[end + n :]


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
