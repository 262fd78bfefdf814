"""The differentiable linear solve: each of its derivatives is another solve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tritonimplicit.linear_solve.base import LinearSolver, Solve
from tritonimplicit.linear_solve.preconditioners import PreconditionedSolver, vmapped
from tritonimplicit.opaque import opaque_call
from tritonimplicit.operators import Jacobian, Matvec, ResidualFn, Tensors, pullback, pushforward
from tritonimplicit.torch_internals import forward_rule, in_trace, untraced

MaybeTensors: TypeAlias = tuple[Tensor | None, ...]
Dims: TypeAlias = tuple[int | None, ...]


@dataclass(frozen=True)
class LinearFamily:
    """The linear maps A(x, args) = d fn / d x, and what solves with one; holds no tensors.

    `depth` counts the batch dimensions that vmap has put in front of every tensor.
    """

    fn: ResidualFn
    solver: Solve
    depth: int = 0

    def solve(self, matvec: Matvec, b: Tensors) -> Tensors:
        """Return u with A u = b, systems of a vmap each by itself where the solver is ours.

        Another solver gets them as one system, whose blocks do not mix. Raises TypeError or
        ValueError for a solver that returns something else than tensors shaped as b.
        """
        solver = self.solver
        if self.depth and isinstance(solver, LinearSolver):
            solver = dataclasses.replace(solver, batch_ndim=solver.batch_ndim + self.depth)
            if isinstance(solver, PreconditionedSolver):
                solver = dataclasses.replace(solver, M=vmapped(solver.M, self.depth))
        return _checked(solver(matvec, b), b)

    def vmapped(self, args_dims: Dims) -> LinearFamily:
        """Return the family over a new leading dimension of x, and of the args where not None."""
        fn = torch.vmap(self.fn, in_dims=(0, args_dims), randomness="same")
        return LinearFamily(fn, self.solver, self.depth + 1)


def linear_solve(
    family: LinearFamily, x: Tensors, args: Tensors, b: Tensors, transpose: bool
) -> Tensors:
    """Return u with A(x, args) u = b, or A^T u = b; differentiable in x, args and b, to any order.

    Good under every torch.func transform; a vmap is one batched solve. The derivatives hold as far
    as the solve does: they take its result for the solution of the equation.
    """
    flat = (*x, *args, *b)
    u: Tensors = _LinearSolve.apply(family, transpose, len(x), *flat)  # type: ignore[no-untyped-call]
    return u


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
    """(x, args, b) -> u, flat; n = len(x) = len(b).

    With a jvp and a vmap rule, `forward` always runs on plain tensors, whatever the transforms: the
    map is recorded once by autograd and replayed, and the solver may look at values. The rules use
    reverse mode and this Function alone, so they hold at every level.
    """

    @staticmethod
    @untraced
    def forward(family: LinearFamily, transpose: bool, n: int, *flat: Tensor) -> Tensors:
        def solve(flat: Sequence[Tensor]) -> Tensors:
            jacobian = Jacobian(family.fn, tuple(flat[:n]), tuple(flat[n:-n]))
            u = family.solve(jacobian.T if transpose else jacobian, tuple(flat[-n:]))
            # A solver may return b itself, which autograd takes for an input, not for an output.
            return tuple(t.clone() if any(t is b for b in flat[-n:]) else t for t in u)

        return opaque_call(solve, lambda flat: flat[-n:], flat) if in_trace() else solve(flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.family, ctx.transpose, ctx.n, *flat = inputs
        ctx.save_for_backward(*flat[: -ctx.n], *output)
        ctx.save_for_forward(*flat[: -ctx.n], *output)

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        family, transpose, n, saved = ctx.family, ctx.transpose, ctx.n, ctx.saved_tensors
        given, u = saved[:-n], saved[-n:]
        w = linear_solve(family, given[:n], given[n:], cotangents, not transpose)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:-n]) if need]
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
        return (None, None, None, *grads, *w)

    @staticmethod
    @untraced
    @forward_rule
    def jvp(ctx: Any, saved: Tensors, *tangents: Any) -> Tensors:
        family, transpose, n = ctx.family, ctx.transpose, ctx.n
        given, u, dots = saved[:-n], saved[-n:], tangents[3:]
        rhs = tuple(
            torch.zeros_like(t) if dot is None else dot for dot, t in zip(dots[-n:], u, strict=True)
        )
        moving = [i for i, dot in enumerate(dots[:-n]) if dot is not None]
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
        info: Any, in_dims: Dims, family: LinearFamily, transpose: bool, n: int, *flat: Tensor
    ) -> tuple[Tensors, Dims]:
        dims = in_dims[3:]
        tensors = batch_first(flat, dims)
        for i in (*range(n), *range(len(flat) - n, len(flat))):
            if (
                dims[i] is None
            ):  # x and b always have the new dimension; forward AD refuses expanded
                tensors[i] = tensors[i].expand(info.batch_size, *tensors[i].shape).contiguous()
        args_dims = tuple(None if dim is None else 0 for dim in dims[n:-n])
        x, args, b = tuple(tensors[:n]), tuple(tensors[n:-n]), tuple(tensors[-n:])
        return linear_solve(family.vmapped(args_dims), x, args, b, transpose), (0,) * n


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
