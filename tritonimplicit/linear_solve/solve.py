"""The differentiable linear solve: its gradient is another solve, with the transpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tritonimplicit.linear_solve.base import Solve
from tritonimplicit.operators import Jacobian, ResidualFn, Tensors, pullback

MaybeTensors: TypeAlias = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class LinearFamily:
    """The linear maps A(x, args) = d fn / d x, and what solves with one; holds no tensors."""

    fn: ResidualFn
    solve: Solve


def linear_solve(
    family: LinearFamily, x: Tensors, args: Tensors, b: Tensors, transpose: bool
) -> Tensors:
    """Return u with A(x, args) u = b, or A^T u = b; differentiable in x, args and b, to any order.

    The derivatives hold as far as the solve does: they take its result for the solution of the
    equation, whatever its tolerance.
    """
    flat = (*x, *args, *b)
    u: Tensors = _LinearSolve.apply(family, transpose, len(x), *flat)  # type: ignore[no-untyped-call]
    return u


def replace_at(
    tensors: Sequence[Any], positions: Sequence[int], new: Sequence[Any]
) -> tuple[Any, ...]:
    """Return `tensors` with `new` in these positions."""
    replaced = list(tensors)
    for position, tensor in zip(positions, new, strict=True):
        replaced[position] = tensor
    return tuple(replaced)


class _LinearSolve(torch.autograd.Function):
    """(x, args, b) -> u, flat; n = len(x) = len(b)."""

    @staticmethod
    def forward(family: LinearFamily, transpose: bool, n: int, *flat: Tensor) -> Tensors:
        jacobian = Jacobian(family.fn, flat[:n], flat[n:-n])
        u = family.solve(jacobian.T if transpose else jacobian, flat[-n:])
        return checked_solution(u, flat[-n:])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.family, ctx.transpose, ctx.n, *flat = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(*flat[: -ctx.n], *output)  # type: ignore[attr-defined]

    @staticmethod
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

            def pulled(*some: Tensor) -> Tensors:
                tensors = replace_at(given, wanted, some)
                return pullback(lambda *x: family.fn(x, tensors[n:]), *tensors[:n])(right)

            pull = pullback(pulled, *(given[i] for i in wanted))
            grads = replace_at(grads, wanted, pull(tuple(-t for t in left)))
        return (None, None, None, *grads, *w)


def checked_solution(u: object, b: Tensors) -> Tensors:
    """Return what a `solve=` callable returned, if it is a tuple shaped as b.

    Raises TypeError or ValueError where a foreign solver breaks its contract.
    """
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
