"""Linear maps from autograd: recorded once, replayed as often as a solver asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.vectors import Layout

Tensors: TypeAlias = tuple[Tensor, ...]
Matvec: TypeAlias = Callable[[TensorTree], TensorTree]
ResidualFn: TypeAlias = Callable[[Tensors, Tensors], Tensors]
"""fn(x, args) -> residual, with as many residual tensors as x has, of the same shapes."""


@runtime_checkable
class Transposable(Protocol):
    """A matvec that knows its transpose."""

    def __call__(self, v: TensorTree, /) -> TensorTree:
        """A v."""
        ...

    @property
    def T(self) -> Matvec:
        """u -> A^T u."""
        ...


class Jacobian:
    """v -> (d fn / d x)(x, args) v on tuples of tensors; `.T` is u -> (d fn / d x)^T u.

    `fn(x, args)` is evaluated once, here. A transposed product replays that graph (a vjp), a
    forward product replays the graph of its transpose (a vjp of a vjp, which needs `fn` to be twice
    differentiable by reverse mode), recorded at the first use. `wrt` numbers the tensors of `args`
    whose `vjp_args` will be asked for, from the same evaluation.
    """

    def __init__(self, fn: ResidualFn, x: Tensors, args: Tensors = (), wrt: Sequence[int] = ()):
        self._x = tuple(t.detach().requires_grad_() for t in x)
        self._args = tuple(t.detach().requires_grad_(i in wrt) for i, t in enumerate(args))
        self._wrt = tuple(wrt)
        with torch.enable_grad():
            self._y = fn(self._x, self._args)
        self._transposed: tuple[Tensors, Tensors] | None = None

    @property
    def outputs(self) -> Tensors:
        """fn(x, args), attached to the recorded graph."""
        return self._y

    @property
    def leaves(self) -> Tensors:
        """The tensors that the recorded graph was differentiated in: x, and the `wrt` of args."""
        return (*self._x, *(self._args[i] for i in self._wrt))

    def __call__(self, v: Tensors) -> Tensors:
        """A v: a replayed vjp of the vjp."""
        if self._transposed is None:
            with torch.enable_grad():
                cotangents = tuple(torch.zeros_like(y, requires_grad=True) for y in self._y)
                pulled = _vjp(self._y, self._x, cotangents, create_graph=True)
            self._transposed = (pulled, cotangents)
        pulled, cotangents = self._transposed
        return _vjp(pulled, cotangents, v)

    @property
    def T(self) -> Transpose:
        """The transposed map, over the same recording."""
        return Transpose(self)

    def vjp(self, u: Tensors) -> Tensors:
        """A^T u: a replayed vjp into x."""
        return _vjp(self._y, self._x, u)

    def vjp_args(self, u: Tensors) -> Tensors:
        """(d fn / d args)^T u for the args numbered by `wrt`."""
        return _vjp(self._y, tuple(self._args[i] for i in self._wrt), u)


class Transpose:
    """The transpose of a `Jacobian`, sharing its recording."""

    def __init__(self, jacobian: Jacobian):
        self._jacobian = jacobian

    def __call__(self, u: Tensors) -> Tensors:
        """A^T u."""
        return self._jacobian.vjp(u)

    @property
    def T(self) -> Jacobian:
        """The map itself."""
        return self._jacobian


def transpose(matvec: Matvec, like: TensorTree) -> Matvec:
    """u -> A^T u for a linear `matvec` on pytrees like `like`: its own `.T`, else a recorded vjp.

    Raises TypeError or ValueError where the matvec's result is not shaped as its argument, and
    RuntimeError where it does not depend on it through autograd.
    """
    if isinstance(matvec, Transposable):
        return matvec.T
    leaves, spec = optree.tree_flatten(like)
    x = tuple(torch.zeros_like(leaf, requires_grad=True) for leaf in leaves)
    with torch.enable_grad():
        y = matvec(optree.tree_unflatten(spec, x))
    out_leaves = Layout.of(like).leaves_of(y, "the result of the matvec")
    if not any(leaf.requires_grad for leaf in out_leaves):
        raise RuntimeError(
            "the matvec has no transpose: its result does not depend on its argument through "
            "autograd (was it computed under torch.no_grad(), detached, or outside torch?). "
            "Give an operator with a `.T`, or use a solver that needs A alone."
        )

    def rmatvec(u: TensorTree) -> TensorTree:
        return optree.tree_unflatten(spec, _vjp(tuple(out_leaves), x, optree.tree_leaves(u)))

    return rmatvec


def pullback(fn: Callable[..., Tensors], *primals: Tensor) -> Callable[[Tensors], Tensors]:
    """u -> J^T u, J the Jacobian of `fn` at `primals`; differentiable in both, to any order."""
    pull: Callable[[Tensors], Tensors] = torch.func.vjp(fn, *primals)[1]
    return pull


def pushforward(
    fn: Callable[..., Tensors], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensors:
    """J v as a vjp of the vjp, in reverse mode alone; differentiable to any order.

    torch.func.jvp would fail under a bare forward_ad.dual_level and in a trace.
    """
    y, pull = torch.func.vjp(fn, *primals)[:2]
    zeros = tuple(torch.zeros_like(t) for t in y)
    pushed: tuple[Tensors] = torch.func.vjp(pull, zeros)[1](tuple(tangents))
    return pushed[0]


def _vjp(y: Tensors, x: Tensors, u: Sequence[Tensor], create_graph: bool = False) -> Tensors:
    """Cotangents of x, zero where y does not depend on it; keeps the graph for the next replay."""
    # An output without grad contributes nothing, but autograd refuses it.
    live = [(out, cot) for out, cot in zip(y, u, strict=True) if out.requires_grad]
    if not live:
        return tuple(torch.zeros_like(t) for t in x)
    outputs, cotangents = zip(*live, strict=True)
    return torch.autograd.grad(
        outputs,
        x,
        cotangents,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
