"""Pytree <-> one padded contiguous (B, ld) buffer: between users' tensors and the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import optree
import torch
from optree import PyTreeSpec
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree

ALIGNMENT = 16
"""Elements: each leaf starts at a multiple of it, so that the kernels load 128 bits at a time."""
_ALIGNMENT_BYTES = 64
"""BLAS adds up a row in an order that depends on where it begins; 16 would do for the kernels."""


@dataclass(frozen=True)
class Layout:
    """Where the leaves of a pytree of tensors lie in a (B, ld) buffer, one row a system.

    The leading `len(batch_shape)` dimensions of every leaf index B independent systems. Each leaf's
    elements start at a multiple of 16, the padding between them is zero, `ld` is the padded width
    and `n` the number of true elements of a system. `dtype` is the working precision: float64 where
    a leaf is float64, float32 otherwise (also for half precision leaves). Errors call the pytree
    that was laid out `name`.
    """

    spec: PyTreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    batch_shape: torch.Size
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    n: int
    ld: int
    dtype: torch.dtype
    device: torch.device
    name: str = "b"

    @classmethod
    def of(cls, tree: TensorTree, batch_ndim: int = 0, name: str = "b") -> Layout:
        """Lay out `tree`; `name` is what errors call it.

        Raises TypeError for a leaf that is no real floating point tensor, ValueError for an empty
        pytree, no elements, several devices, or leaves that do not share the batch dimensions.
        """
        paths, leaves, spec = optree.tree_flatten_with_path(tree)
        if not leaves:
            raise ValueError(f"{name} is a pytree without tensors: there is nothing to solve for.")
        for path, leaf in zip(paths, leaves, strict=True):
            _check_leaf(leaf, batch_ndim, leaves[0], f"{name}{_show(path)}")
        batch_shape = leaves[0].shape[:batch_ndim]
        sizes = tuple(math.prod(leaf.shape[batch_ndim:]) for leaf in leaves)
        starts, ld = [], 0
        for size in sizes:
            starts.append(ld)
            ld += -(-size // ALIGNMENT) * ALIGNMENT
        if ld * math.prod(batch_shape) == 0:
            raise ValueError(f"{name} has no elements (shapes {[tuple(t.shape) for t in leaves]}).")
        double = any(leaf.dtype is torch.float64 for leaf in leaves)
        return cls(
            spec=spec,
            shapes=tuple(leaf.shape for leaf in leaves),
            dtypes=tuple(leaf.dtype for leaf in leaves),
            batch_shape=batch_shape,
            starts=tuple(starts),
            sizes=sizes,
            n=sum(sizes),
            ld=ld,
            dtype=torch.float64 if double else torch.float32,
            device=leaves[0].device,
            name=name,
        )

    @property
    def systems(self) -> int:
        """B, the number of independent systems."""
        return math.prod(self.batch_shape)

    def zeros(self) -> Tensor:
        """A new (B, ld) buffer of zeros."""
        return torch.zeros(self.systems, self.ld, dtype=self.dtype, device=self.device)

    def elements(self) -> Tensor:
        """(n,) positions in a row that are not padding."""
        spans = zip(self.starts, self.sizes, strict=True)
        return torch.cat([torch.arange(s, s + size, device=self.device) for s, size in spans])

    def flatten(self, tree: TensorTree, name: str) -> Tensor:
        """Copy `tree` into a new (B, ld) buffer. Raises as `leaves_of` does."""
        return self._fill(self.zeros(), self.leaves_of(tree, name))

    def gather(self, tree: TensorTree, name: str) -> Tensor:
        """`tree` as (B, ld), to be read only: in place where its one leaf fits, else a copy.

        Raises as `leaves_of` does.
        """
        leaves = self.leaves_of(tree, name)
        rows = self.in_place(leaves)
        return self._fill(self.zeros(), leaves) if rows is None else rows

    def in_place(self, leaves: list[Tensor]) -> Tensor | None:
        """(B, ld), to be read only, where one leaf is all that there is; else None."""
        if len(leaves) == 1 and self.n == self.ld and _readable(leaves[0], self.dtype):
            return leaves[0].detach().view(self.systems, self.ld)
        return None

    def unflatten(self, rows: Tensor) -> TensorTree:
        """The (B, ld) buffer's leaves as a pytree: views of it, but for leaves of another dtype."""
        return self.tree(self.views(rows))

    def tree(self, views: list[Tensor]) -> TensorTree:
        """The `views` of a (B, ld) buffer as a pytree, those of another dtype converted."""
        leaves = [
            view if view.dtype is dtype else view.to(dtype)
            for view, dtype in zip(views, self.dtypes, strict=True)
        ]
        return optree.tree_unflatten(self.spec, leaves)

    def overflown(self, rows: Tensor) -> Tensor | None:
        """(B,) bool: whether a number of a row (B, ld) is too large for its leaf's dtype.

        None where no leaf's numbers end before those of the rows.
        """
        spans = zip(self.starts, self.sizes, self.dtypes, strict=True)
        over = [
            rows[:, start : start + size].to(dtype).isinf().any(1)
            for start, size, dtype in spans
            if torch.finfo(dtype).max < torch.finfo(self.dtype).max
        ]
        return torch.stack(over).any(0) if over else None

    def per_system(self, values: Tensor) -> Tensor:
        """(B,) values as a tensor of the batch's shape."""
        return values.view(self.batch_shape)

    def leaves_of(self, tree: TensorTree, name: str) -> list[Tensor]:
        """The leaves of `tree`, which must have this layout's structure, shapes, dtypes and device.

        Raises TypeError for another structure or dtype, ValueError for another shape or device.
        """
        leaves, spec = optree.tree_flatten(tree)
        if spec != self.spec:
            raise TypeError(
                f"{name} has the structure {spec}; the structure of {self.name} is {self.spec}."
            )
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} has a leaf of type {type(leaf).__name__}, not a tensor.")
            if leaf.shape != shape:
                raise ValueError(
                    f"{name} has a leaf of shape {tuple(leaf.shape)} where {self.name} has "
                    f"{tuple(shape)}."
                )
            if leaf.dtype is not dtype:
                raise TypeError(
                    f"{name} has a leaf of dtype {leaf.dtype} where {self.name} has {dtype}."
                )
            if leaf.device != self.device:
                raise ValueError(
                    f"{name} has a leaf on {leaf.device}; {self.name} is on {self.device}."
                )
        return leaves

    def _fill(self, rows: Tensor, leaves: list[Tensor]) -> Tensor:
        # One call for all of them, on a GPU one launch.
        torch._foreach_copy_(self.views(rows), [leaf.detach() for leaf in leaves])
        return rows

    def views(self, rows: Tensor) -> list[Tensor]:
        """The leaves of the (B, ld) buffer, as views of it.

        By strides: a slice and a view would be two calls a leaf, which cost more than small leaves.
        """
        row, offset = rows.stride(0), rows.storage_offset()
        batch = [stride * row for stride in _contiguous(self.batch_shape)]
        leaves = zip(self.shapes, self._inner_strides, self.starts, strict=True)
        return [
            rows.as_strided(shape, (*batch, *inner), offset + start)
            for shape, inner, start in leaves
        ]

    @cached_property
    def _inner_strides(self) -> list[list[int]]:
        """The strides of a leaf's dimensions below those of the batch."""
        return [_contiguous(shape[len(self.batch_shape) :]) for shape in self.shapes]


def _contiguous(shape: torch.Size) -> list[int]:
    """The strides of a contiguous tensor of this shape."""
    strides, size = [], 1
    for extent in reversed(shape):
        strides.append(size)
        size *= extent
    return strides[::-1]


def beside(values: Tensor, leaf: Tensor) -> Tensor:
    """Values of a batch's shape with as many dimensions as a leaf, to be broadcast along it."""
    return values.reshape(*values.shape, *(1,) * (leaf.ndim - values.ndim))


def _readable(leaf: Tensor, dtype: torch.dtype) -> bool:
    aligned = leaf.data_ptr() % _ALIGNMENT_BYTES == 0
    return leaf.dtype is dtype and leaf.is_contiguous() and aligned and not leaf.is_neg()


def _show(path: tuple[object, ...]) -> str:
    return "".join(f"[{entry!r}]" for entry in path)


def _check_leaf(leaf: object, batch_ndim: int, first: Tensor, name: str) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name} is a {type(leaf).__name__}, not a tensor.")
    if not leaf.is_floating_point():
        raise TypeError(f"{name} has dtype {leaf.dtype}; a real floating point dtype is needed.")
    if leaf.layout is not torch.strided:
        raise TypeError(f"{name} is a {leaf.layout} tensor; a dense (strided) one is needed.")
    if leaf.device != first.device:
        raise ValueError(f"{name} is on {leaf.device}, the first leaf on {first.device}.")
    if leaf.ndim < batch_ndim or leaf.shape[:batch_ndim] != first.shape[:batch_ndim]:
        raise ValueError(
            f"{name} has shape {tuple(leaf.shape)}: with batch_ndim={batch_ndim} every leaf must "
            f"begin with the same {batch_ndim} dimensions; the first leaf is {tuple(first.shape)}."
        )
