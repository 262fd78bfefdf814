"""Linear maps that name the tensors which they depend on, and sums of a map and a ridge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import optree
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.operators import Matvec, ResidualFn, Tensors, transpose
from tritonimplicit.vectors import Layout


class LinearOperator:
    """v -> fn(v, *tensors), a linear map that names the tensors which it depends on.

    A solver called with one is differentiable in them, to any order and under every torch.func
    transform; of a plain function's closure it sees less. `tensors` are tensors, or pytrees of
    tensors. `symmetric` and `positive_definite` are taken at their word: `solve_auto` picks by
    them, and a symmetric map is its own transpose.

    Raises TypeError for a `fn` that is no function, or a leaf of `tensors` that is no tensor.
    """

    def __init__(
        self,
        fn: Callable[..., TensorTree],
        *tensors: TensorTree,
        symmetric: bool = False,
        positive_definite: bool = False,
    ):
        if not callable(fn):
            raise TypeError(f"fn must be a function (v, *tensors) -> A v, not {fn!r}.")
        self.fn, self.tensors = fn, tensors
        self.symmetric = symmetric or positive_definite
        self.positive_definite = positive_definite
        tree: TensorTree = tensors
        self.leaves, self._spec = optree.tree_flatten(tree)
        for leaf in self.leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"tensors has a leaf of type {type(leaf).__name__}, not a tensor.")

    def __call__(self, v: TensorTree) -> TensorTree:
        """A v."""
        return self.fn(v, *self.tensors)

    def at(self, leaves: Sequence[Tensor]) -> Matvec:
        """The map with these tensors in the place of its own, in the order of `leaves`."""
        tensors = optree.tree_unflatten(self._spec, leaves)
        return lambda v: self.fn(v, *tensors)


class LinearMap:
    """v -> fn(v, args) on tuples like `x`, linear in v; `.T` is recorded from it by autograd."""

    def __init__(
        self,
        fn: ResidualFn,
        x: Tensors,
        args: Tensors,
        symmetric: bool = False,
        positive_definite: bool = False,
    ):
        self._fn, self._x, self._args = fn, x, args
        self.symmetric, self.positive_definite = symmetric, positive_definite

    def __call__(self, v: Tensors) -> Tensors:
        """A v."""
        return self._fn(v, self._args)

    @property
    def T(self) -> Matvec:
        """The transposed map, recorded anew."""
        return self if self.symmetric else transpose(self._apply, self._x)

    def _apply(self, v: Tensors) -> Tensors:
        return self._fn(v, self._args)


def shifted(matvec: Matvec, ridge: Tensor, batch_ndim: int) -> Matvec:
    """v -> A v + ridge v; the ridge is 0-dim or has the shape of the `batch_ndim` dimensions.

    It may be negative: a positive definite A stays symmetric, and no more is known.
    """

    def add(product: TensorTree, v: TensorTree, ridge: Tensor) -> TensorTree:
        leaves, spec = optree.tree_flatten(v)
        products = tuple(Layout.of(v).leaves_of(product, "the result of the matvec"))
        return optree.tree_unflatten(spec, add_scaled(products, tuple(leaves), ridge, batch_ndim))

    if isinstance(matvec, LinearOperator):
        fn = matvec.fn
        return LinearOperator(
            lambda v, ridge, *tensors: add(fn(v, *tensors), v, ridge),
            ridge,
            *matvec.tensors,
            symmetric=matvec.symmetric,
        )
    return lambda v: add(matvec(v), v, ridge)


def add_scaled(products: Tensors, v: Tensors, ridge: Tensor, batch_ndim: int) -> Tensors:
    """A v + ridge v, on leaves, for a ridge that is 0-dim or has the shape of the batch.

    Dimensions that vmap has put before the batch, and the ridge has not, count in `batch_ndim`.
    """

    def scale(leaf: Tensor) -> Tensor:
        return ridge.reshape(ridge.shape + (1,) * (leaf.ndim - batch_ndim)) if ridge.ndim else ridge

    pairs = zip(products, v, strict=True)
    return tuple((av + scale(leaf) * leaf).to(leaf.dtype) for av, leaf in pairs)
