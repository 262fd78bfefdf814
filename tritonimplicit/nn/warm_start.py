"""Warm starts: the last solutions of a DEQ, by the number of the sample."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import Solution, TensorTree
from tritonimplicit.linear_solve.base import check_count
from tritonimplicit.torch_internals import transforms_active
from tritonimplicit.vectors import beside
from tritonimplicit_kernels import status as codes


class WarmStart:
    """Remembers where each sample's fixed point was, for the next time that it comes.

    `deq = DEQ(layer, warm_start=WarmStart(size))`, then `deq(x, index=i)`: i (B,) integers number
    the samples of the batch, which are the first dimension of every leaf of z. A sample that is
    new, or that diverged the last time, starts at z0. With `adjoint`, the linear solves of backward
    passes start from the sample's last u as well; that needs `Implicit` or `SHINE` with an
    iterative solver, and costs each of them a vjp.

    It holds `size` samples of z, in z's dtypes and on its device, and as many of u with `adjoint`.
    Sample i lies in place i mod `size`, where it replaces another: give the number of samples as
    `size`, and none is lost. It is a cache: no part of a `state_dict()`, empty in copies and
    pickles, and it follows z to another device or dtype. Of several processes each remembers what
    it has seen itself. torch.func transforms start from what there is and add nothing to it.
    """

    def __init__(self, size: int, *, adjoint: bool = False):
        check_count("size", size)
        if size == 0:
            raise ValueError("size must be at least 1: it is the number of samples to remember.")
        if not isinstance(adjoint, bool):
            raise TypeError(f"adjoint must be a bool, not {type(adjoint).__name__}.")
        self.size, self.adjoint = size, adjoint
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self._z, self._u = _Table(self.size), _Table(self.size)

    def starts(self, index: Tensor, z0: TensorTree) -> tuple[TensorTree, Starts]:
        """Return where the samples numbered by `index` start, new ones at z0, and their `Starts`.

        Raises TypeError or ValueError for an index that does not number the samples of z0.
        """
        leaves, spec = optree.tree_flatten(z0)
        index = _checked(index, leaves)
        z = optree.tree_unflatten(spec, self._z.fetch(index, leaves))
        return z, Starts(index, leaves, self._z, self._u if self.adjoint else None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the samples out."""
        return {**self.__dict__, "_z": _Table(self.size), "_u": _Table(self.size)}

    def __repr__(self) -> str:
        return f"WarmStart({self.size}, adjoint={self.adjoint})"


class Starts:
    """Where the solutions of a batch go, and where its adjoints start.

    `u` are the leaves of the last adjoints, zero for new samples; None if there is none at all.
    """

    def __init__(self, index: Tensor, leaves: list[Tensor], z: _Table, u: _Table | None):
        self.u: tuple[Tensor, ...] | None = None
        if u is not None and not u.empty:
            self.u = tuple(u.fetch(index, [torch.zeros_like(leaf) for leaf in leaves]))
        self._index, self._shapes = index, [leaf.shape for leaf in leaves]
        # The tensors of a transform must not outlive it.
        self._tables = (None, None) if transforms_active() else (z, u)

    def keep(self, forward: Solution) -> None:
        """Remember the fixed points."""
        if self._tables[0] is not None:
            values = optree.tree_leaves(forward.value)
            self._tables[0].store(self._index, values, forward.status)

    def keep_adjoint(self, backward: Solution) -> None:
        """Remember u, of the first linear system after the forward pass.

        Those of second derivatives come after it, and have another solution.
        """
        table, self._tables = self._tables[1], (None, None)
        leaves = optree.tree_leaves(backward.value)
        if table is not None and [leaf.shape for leaf in leaves] == self._shapes:
            table.store(self._index, leaves, backward.status)


class _Table:
    """The last value of each of `size` places, and whose it is; sample i lies in i mod size."""

    def __init__(self, size: int):
        self._size = size
        self._values: list[Tensor] = []
        self._owner = torch.empty(0, dtype=torch.int64)

    @property
    def empty(self) -> bool:
        return not self._values

    def fetch(self, index: Tensor, otherwise: list[Tensor]) -> list[Tensor]:
        """Values of the samples that are known, `otherwise` those of the rest."""
        if self.empty:
            return otherwise
        self._follow(otherwise)
        places = index % self._size
        known = self._owner[places] == index
        pairs = zip(self._values, otherwise, strict=True)
        return [torch.where(beside(known, leaf), table[places], leaf) for table, leaf in pairs]

    @torch.inference_mode(False)  # whose tensors could not be written to outside of it
    def store(self, index: Tensor, values: list[Tensor], status: Tensor) -> None:
        """Remember the samples whose solve came to something, forget those of the rest."""
        if self.empty:
            self._values = [v.new_zeros(self._size, *v.shape[1:]) for v in values]
            self._owner = index.new_full((self._size,), torch.iinfo(torch.int64).min)
        self._follow(values)
        usable = status < codes.BREAKDOWN  # of the whole batch, of each sample, or of its parts
        good = usable.view(len(index), -1).all(1) if status.ndim else usable.expand(len(index))
        # Of several samples for one place the last has it: all of them write the same.
        places = index % self._size
        order = places.argsort(stable=True)
        winner = order[torch.searchsorted(places[order], places, right=True) - 1]
        owner = torch.where(good, index, torch.iinfo(torch.int64).min)
        self._owner[places] = owner[winner]
        for table, leaf in zip(self._values, values, strict=True):
            table[places] = leaf.detach()[winner]

    @torch.inference_mode(False)
    def _follow(self, like: list[Tensor]) -> None:
        """Move to the device and the dtypes of these values."""
        shapes = [tuple(leaf.shape[1:]) for leaf in like]
        own = [tuple(table.shape[1:]) for table in self._values]
        if shapes != own:
            raise ValueError(
                f"the warm starts are of samples of shape {own}, these have {shapes}: use a DEQ "
                "with a WarmStart of its own for each shape, or clear() it."
            )
        self._values = [t.to(leaf) for t, leaf in zip(self._values, like, strict=True)]
        self._owner = self._owner.to(like[0].device)


def _checked(index: object, leaves: list[Tensor]) -> Tensor:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype is torch.bool:
        got = f"tensor of {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be a tensor of integers that number the samples, not {got}.")
    for leaf in leaves:
        if index.ndim != 1 or leaf.shape[:1] != index.shape:
            raise ValueError(
                f"index has shape {tuple(index.shape)}; it must have one number for each sample, "
                f"the first dimension of z, which has shape {tuple(leaf.shape)}."
            )
    return index.to(leaves[0].device, torch.int64)
