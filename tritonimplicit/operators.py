"""Linear maps from autograd: recorded once, replayed as often as a solver asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.torch_internals import forward_rule, transforms_active
from tritonimplicit.vectors import Layout

Tensors: TypeAlias = tuple[Tensor, ...]
Matvec: TypeAlias = Callable[[TensorTree], TensorTree]
Product: TypeAlias = Callable[[Tensors], Tensors]
Solve: TypeAlias = Callable[..., Any]
"""What solves A x = b: (matvec, b) -> x. Ours, TorchOpt's, or any function of that form."""
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

    Both products are differentiable in their vector, by autograd and under torch.func transforms:
    solvers that are not ours get the transpose or the matrix that way. Where the Jacobian is known
    to be `symmetric`, as that of a gradient is, both are the cheaper vjp.

    A product raises RuntimeError where `fn` does not depend on x through autograd, unless the
    Jacobian `may_be_zero`.
    """

    def __init__(
        self,
        fn: ResidualFn,
        x: Tensors,
        args: Tensors = (),
        wrt: Sequence[int] = (),
        symmetric: bool = False,
        may_be_zero: bool = False,
    ):
        self.symmetric = symmetric
        self._may_be_zero = may_be_zero
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
        if self.symmetric:
            return self.vjp(v)
        return _differentiable(self._push, self._pull, v)

    @property
    def T(self) -> Transpose:
        """The transposed map, over the same recording."""
        return Transpose(self)

    def vjp(self, u: Tensors) -> Tensors:
        """A^T u: a replayed vjp into x."""
        return _differentiable(self._pull, self._pull if self.symmetric else self._push, u)

    def vjp_args(self, u: Tensors) -> Tensors:
        """(d fn / d args)^T u for the args numbered by `wrt`."""
        return _vjp(self._y, tuple(self._args[i] for i in self._wrt), u)

    def _pull(self, u: Tensors, create_graph: bool = False) -> Tensors:
        pulled = _reached(self._y, self._x, u, create_graph)
        if not self._may_be_zero and all(t is None for t in pulled):
            raise RuntimeError(
                "the optimality, or the layer, does not depend on its first argument, the "
                "solution, through autograd, so that its Jacobian is zero. Was that argument "
                "detached, or the result computed under torch.no_grad() or outside torch?"
            )
        return _filled(pulled, self._x)

    def _push(self, v: Tensors) -> Tensors:
        if self._transposed is None:
            with torch.enable_grad():
                cotangents = tuple(torch.zeros_like(y, requires_grad=True) for y in self._y)
                pulled = self._pull(cotangents, create_graph=True)
            self._transposed = (pulled, cotangents)
        pulled, cotangents = self._transposed
        return _vjp(pulled, cotangents, v)


class Transpose:
    """The transpose of a `Jacobian`, sharing its recording."""

    def __init__(self, jacobian: Jacobian):
        self._jacobian = jacobian
        self.symmetric = jacobian.symmetric

    def __call__(self, u: Tensors) -> Tensors:
        """A^T u."""
        return self._jacobian.vjp(u)

    @property
    def T(self) -> Jacobian:
        """The map itself."""
        return self._jacobian


def transpose(matvec: Matvec, like: TensorTree) -> Matvec:
    """u -> A^T u for a linear `matvec` on pytrees like `like`: its own `.T`, else a recorded vjp.

    Where grad is enabled, its results are differentiable in what the matvec depends on.

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
        graph = torch.is_grad_enabled()
        pulled = _vjp(tuple(out_leaves), x, optree.tree_leaves(u), create_graph=graph)
        return optree.tree_unflatten(spec, pulled)

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


def _differentiable(product: Product, transposed: Product, v: Tensors) -> Tensors:
    """Return product(v), connected to v where a graph or a transform wants that."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in v)
    if not (recorded or transforms_active()):
        return product(v)
    av: Tensors = _Product.apply(product, transposed, *v)  # type: ignore[no-untyped-call]
    return av


class _Product(torch.autograd.Function):
    """v -> A v, by a replay, whose result autograd would take for a constant.

    The map is linear: its derivatives are products with A and its transpose.
    """

    @staticmethod
    def forward(product: Product, transposed: Product, *v: Tensor) -> Tensors:
        return product(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.product, ctx.transposed, *v = inputs
        ctx.save_for_forward(*v)

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> tuple[Any, ...]:
        return None, None, *_differentiable(ctx.transposed, ctx.product, u)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, v: Tensors, _: None, __: None, *tangents: Tensor | None) -> Tensors:
        moved = zip(tangents, v, strict=True)
        dots = tuple(torch.zeros_like(t) if dot is None else dot for dot, t in moved)
        return _differentiable(ctx.product, ctx.transposed, dots)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        product: Product,
        transposed: Product,
        *v: Tensor,
    ) -> tuple[Tensors, tuple[int, ...]]:
        moved = zip(v, in_dims[2:], strict=True)
        rows = tuple(
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in moved
        )
        av = _differentiable(torch.vmap(product), torch.vmap(transposed), rows)
        return av, (0,) * len(av)


def graph_leaves(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Leaf tensors that require grad in the recorded graph of `outputs`."""
    pending = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(pending)
    leaves = [t for t in outputs if t.requires_grad and t.grad_fn is None]
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)  # only the graph's accumulation nodes have one
        if leaf is not None:
            leaves.append(leaf)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return leaves


def _vjp(y: Tensors, x: Tensors, u: Sequence[Tensor], create_graph: bool = False) -> Tensors:
    """Cotangents of x, zero where y does not depend on it; keeps the graph for the next replay."""
    return _filled(_reached(y, x, u, create_graph), x)


def _reached(
    y: Tensors, x: Tensors, u: Sequence[Tensor], create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Cotangents of x, None where y does not depend on it."""
    # An output without grad contributes nothing, but autograd refuses it.
    live = [(out, cot) for out, cot in zip(y, u, strict=True) if out.requires_grad]
    if not live:
        return (None,) * len(x)
    outputs, cotangents = zip(*live, strict=True)
    return torch.autograd.grad(
        outputs, x, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
    )


def _filled(cotangents: Sequence[Tensor | None], like: Tensors) -> Tensors:
    pairs = zip(cotangents, like, strict=True)
    return tuple(torch.zeros_like(t) if cot is None else cot for cot, t in pairs)
