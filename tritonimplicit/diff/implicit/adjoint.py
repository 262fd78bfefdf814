"""The implicit function theorem, and nothing else: dx = -A^-1 (d fn / d args) dargs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tritonimplicit.linear_solve.family import LinearFamily
from tritonimplicit.linear_solve.solve import linear_solve, replace_at
from tritonimplicit.operators import Jacobian, Tensors, pullback, pushforward


def root_vjp(family: LinearFamily, jacobian: Jacobian, cotangents: Tensors) -> Tensors:
    """Pull cotangents of the root x, fn(x, args) = 0, back into the args that `jacobian` recorded.

    With A = d fn / d x: A^T u = -cotangents, then (d fn / d args)^T u. One solve, and no
    evaluation of fn beyond the recording.
    """
    u = family.solve(jacobian.T, _negated(cotangents))
    return jacobian.vjp_args(u)


def differentiable_root_vjp(
    family: LinearFamily, x: Tensors, args: Tensors, wrt: Sequence[int], cotangents: Tensors
) -> Tensors:
    """`root_vjp` into the args numbered by `wrt`, itself differentiable, under any transform."""
    u = linear_solve(family, x, args, _negated(cotangents), transpose=True)
    return pullback(_in_args(family, x, args, wrt), *(args[i] for i in wrt))(u)


def root_jvp(
    family: LinearFamily, x: Tensors, args: Tensors, wrt: Sequence[int], tangents: Sequence[Tensor]
) -> Tensors:
    """Push tangents of the args numbered by `wrt` forward to the root; differentiable as well.

    The solver's preconditioner and guess are those of `root_vjp`, of the other transpose.
    """
    moved = pushforward(_in_args(family, x, args, wrt), [args[i] for i in wrt], tangents)
    return linear_solve(family.flipped(), x, args, _negated(moved), transpose=False)


def _in_args(
    family: LinearFamily, x: Tensors, args: Tensors, wrt: Sequence[int]
) -> Callable[..., Tensors]:
    return lambda *some: family.fn(x, replace_at(args, wrt, some))


def _negated(tensors: Tensors) -> Tensors:
    return tuple(-t for t in tensors)
