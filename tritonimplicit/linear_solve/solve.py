"""The differentiable linear solve: each of its derivatives is another solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.family import Dims, LinearFamily
from tritonimplicit.opaque import opaque_call
from tritonimplicit.operators import Tensors, pullback, pushforward
from tritonimplicit.torch_internals import (
    forward_rule,
    in_trace,
    refuse_legacy_batched,
    untraced,
)

MaybeTensors: TypeAlias = tuple[Tensor | None, ...]


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
