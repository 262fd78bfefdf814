"""Work on (B, ld) vectors a tile at a time, so that a tile stays in cache from first use to last.

A step is several torch calls a tile; over whole vectors each call would stream memory again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

# A tile, 1 MiB of a float32 vector, lives in the shared cache rather than in a core's own: a call
# costs a microsecond, and a parallel one several, so that smaller tiles lose more than they save.
# At n = 1e7 twice as many elements cost as much, a quarter as many a quarter more.
TILE: Final = 2**18

Rows = slice | Tensor
_ALL: Final = slice(None)


def row_groups(
    vector: Tensor, wanted: Tensor | list[bool] | None = None, weight: int = 1
) -> Iterator[Rows]:
    """Cut the rows of `vector` (B, ld), or those `wanted` (B,), into groups of a tile.

    `weight` vectors of each system share the tile. A group is a slice, or indices where the wanted
    rows are scattered. A row longer than a tile is a group of its own, in a batch as alone.
    """
    batch, ld = vector.shape
    size = max(1, TILE // (weight * ld))
    wants = wanted.tolist() if isinstance(wanted, Tensor) else wanted
    if wants is None or all(wants):
        if 0 < batch <= size:
            yield _ALL
            return
        wanted_rows: Sequence[int] = range(batch)
    else:
        wanted_rows = [row for row, want in enumerate(wants) if want]
    for start in range(0, len(wanted_rows), size):
        group = wanted_rows[start : start + size]
        first, end = group[0], group[-1] + 1
        yield slice(first, end) if end - first == len(group) else torch.tensor(group, device="cpu")


def take(rows: Rows, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Index the first dimension: by a slice that is a view, by indices a copy, to be put back."""
    if rows is _ALL:
        return tensors
    if isinstance(rows, Tensor):
        # Row by row, where indexing goes element by element; a tensor that comes twice once.
        once = {id(tensor): tensor for tensor in tensors}
        taken = {key: tensor.index_select(0, rows) for key, tensor in once.items()}
        return tuple(taken[id(tensor)] for tensor in tensors)
    return tuple(tensor[rows] for tensor in tensors)


def put_back(rows: Rows, tensors: Sequence[Tensor], taken: Sequence[Tensor]) -> None:
    """Write what was taken into `tensors` again, unless it is a view of them."""
    if isinstance(rows, Tensor):
        for tensor, rows_of_it in zip(tensors, taken, strict=True):
            tensor.index_copy_(0, rows, rows_of_it)


def write_sums(out: Tensor, rows: Rows, sums: Tensor) -> None:
    """Write `sums` (..., R) as the first partial sums of these rows of `out` (..., B, P)."""
    first = out.select(-1, 0)
    if rows is _ALL:
        first.copy_(sums)
    else:
        first[..., rows] = sums


def total(partials: Tensor) -> Tensor:
    """Return the sums (...) of partial sums (..., P)."""
    return partials.select(-1, 0) if partials.shape[-1] == 1 else partials.sum(-1)


def column_tiles(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut (R, ld) vectors alike along their columns, into views of a tile where R is one."""
    if vectors[0].shape[1] <= TILE:
        return iter((vectors,))
    return zip(*(vector.split(TILE, dim=1) for vector in vectors), strict=True)
