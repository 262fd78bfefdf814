"""A system as the kernels see it: (B, ld) rows, and a matvec from rows to rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import Status, TensorTree
from tritonimplicit.operators import Matvec
from tritonimplicit.torch_internals import has_tangent, is_transformed
from tritonimplicit.vectors import Layout


@dataclass(frozen=True)
class RowSolution:
    """`Solution`, on rows: x is (B, ld), the others are (B,), `history` is (steps + 1, B).

    `present` are the statuses that occur, where the host has read them already.
    """

    x: Tensor
    status: Tensor
    iterations: Tensor
    residual_norm: Tensor
    present: frozenset[Status] | None = None
    history: Tensor | None = None


class RowMatvec:
    """(B, ld) -> (B, ld): v -> A v + ridge v, by a matvec on pytrees, which errors call `name`.

    What it returns is to be read only, and valid until the next call.
    """

    def __init__(
        self,
        matvec: Matvec,
        layout: Layout,
        ridge: float | Tensor | None = None,
        name: str = "the matvec",
    ):
        self.layout = layout
        self.matvec = matvec
        self.ridge = ridge
        self._name = name
        self._argument = _KeptViews(layout)
        self._out: Tensor | None = None
        self._out_views: list[Tensor] = []
        self._tables: kernels.LeafTables | None = None
        self._leaves: list[Tensor] = []

    def __call__(self, v: Tensor) -> Tensor:
        """A v + ridge v."""
        leaves = self._result(v)
        rows = self.layout.in_place(leaves)
        if rows is None:
            rows = self._buffer()
            torch._foreach_copy_(self._out_views, leaves)
        elif self.ridge is None and share_memory(rows, v):
            # An identity hands v back, and v changes while the result is read.
            return self._buffer().copy_(rows)
        if isinstance(self.ridge, Tensor):
            return torch.addcmul(rows, v, self.ridge, out=self._buffer())
        if self.ridge is not None:
            return torch.add(rows, v, alpha=self.ridge, out=self._buffer())
        return rows

    def twin(self) -> RowMatvec:
        """Return the same with a buffer of its own, and with the same tables."""
        twin = RowMatvec(self.matvec, self.layout, self.ridge, self._name)
        twin._tables = self._tables
        return twin

    def read_leaves_in_place(self) -> None:
        """Have `product` return tables of leaves, where rows would be a copy of what A v is.

        A ridge makes a new vector anyway, and one leaf that fills its row is a row.
        """
        layout = self.layout
        fills = layout.dtypes == (layout.dtype,) and layout.n == layout.ld
        if self.ridge is None and not fills:
            self._tables = kernels.LeafTables(
                layout.starts, layout.sizes, layout.ld, layout.dtype, layout.device
            )

    def product(self, v: Tensor) -> Tensor:
        """A v + ridge v as a fused step takes it: rows, or a table of leaves (int64)."""
        if self._tables is None:
            return self(v)
        self._leaves.clear()  # a graph that is being captured has their memory for this product
        self._leaves += self.parts(v)
        return self.joined(self._leaves)

    def parts(self, v: Tensor) -> list[Tensor]:
        """A v + ridge v in the pieces that `product` reads it from: rows, or leaves (B, size)."""
        if self._tables is None:
            return [self(v)]
        return [
            _in_place(leaf.detach().reshape(self.layout.systems, size), v)
            for leaf, size in zip(self._result(v), self.layout.sizes, strict=True)
        ]

    def joined(self, parts: list[Tensor]) -> Tensor:
        """`product` of `parts`, which have to be kept until the launches that read it are made."""
        return parts[0] if self._tables is None else self._tables.table(parts)

    def before_capture(self, products: int) -> None:
        """Make what a graph with so many products needs, in memory that is not the graph's."""
        if self._tables is not None:
            self._tables.reserve(products)

    def captured(self) -> None:
        """Write the tables that a graph which has been captured reads."""
        if self._tables is not None:
            self._tables.write()

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        """b - (A x + ridge x)."""
        return torch.sub(b, self(x), out=self._buffer())

    def _result(self, v: Tensor) -> list[Tensor]:
        version = None if v.is_inference() else v._version
        result = self.matvec(self._argument.tree(v))
        leaves = self.layout.leaves_of(result, f"the result of {self._name}")
        refuse_gradient(leaves, self._name, self._hidden_derivative)
        if version is not None and v._version != version:
            raise RuntimeError(
                f"{self._name} changed its argument in place, which is the solver's own vector: "
                "return a new tensor."
            )
        return leaves

    def _hidden_derivative(self) -> RuntimeError:
        return hidden_derivative()

    def _buffer(self) -> Tensor:
        if self._out is None:
            self._out = self.layout.zeros()
            self._out_views = self.layout.views(self._out)
        return self._out


class _KeptViews:
    """The leaves of the last (B, ld) buffer, for the next product with the same one."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._rows: Tensor | None = None
        self._views: list[Tensor] = []

    def tree(self, rows: Tensor) -> TensorTree:
        """`Layout.unflatten`, in tensors of this call alone, whatever a user does with them."""
        if rows is not self._rows:
            self._rows, self._views = rows, self._layout.views(rows)
        return self._layout.tree([view.detach() for view in self._views])


def largest(v: Tensor) -> Tensor:
    """(B,) the largest |element| of each row of v (B, ld), NaN where there is one; no copy of v."""
    if v.device.type == "cpu":  # where the norm of this order is many times slower than these
        return torch.maximum(v.amax(1), v.amin(1).neg_())
    size: Tensor = torch.linalg.vector_norm(v, math.inf, dim=1)
    return size


def is_hidden(leaves: Iterable[Tensor]) -> bool:
    """Whether a torch.func transform or forward-mode AD is at work on one of them."""
    return any(is_transformed(t) or has_tangent(t) for t in leaves)


def hidden_derivative() -> RuntimeError:
    """The error of a matvec with a closure that a transform cannot see."""
    return RuntimeError(
        "the matvec closes over a tensor that is being differentiated or vmapped, which a "
        "LinearOperator does not name, or which under a torch.func transform (grad, jvp, vmap, "
        "...) or forward-mode AD no plain function can show: give it openly, by "
        "tritonimplicit.LinearOperator(fn, *tensors), the map v -> fn(v, *tensors)."
    )


def refuse_gradient(
    leaves: Sequence[Tensor],
    name: str = "the matvec",
    hidden: Callable[[], RuntimeError] = hidden_derivative,
) -> None:
    """Raise RuntimeError if a gradient would be lost by what `name` has returned."""
    if is_hidden(leaves):
        raise hidden()
    if any(t.requires_grad for t in leaves):
        raise RuntimeError(
            f"the result of {name} requires grad, and `solver.solve` is not differentiated: "
            "`solver(matvec, b)` is; or call it under torch.no_grad()."
        )


def _in_place(leaf: Tensor, v: Tensor) -> Tensor:
    """`leaf` (B, size) itself, or a copy where kernels cannot read it while v changes."""
    if kernels.readable(leaf) and not share_memory(leaf, v):
        return leaf
    return leaf.resolve_neg().clone(memory_format=torch.contiguous_format)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one piece of memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
