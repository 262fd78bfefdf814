"""Work on (B, ld) vectors a tile at a time, so that a tile stays in cache from first use to last.

A step is several torch calls a tile; over whole vectors each call would stream memory again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Twice the least that torch gives a thread, so that a batch of small systems is one tile. From a
# quarter to four times of it, times at B * n from 1e4 to 1e7 differed by no more than the noise.
_ELEMENTS_PER_THREAD = 65536

Rows = slice | Tensor


def tile_elements() -> int:
    """Return the number of elements of a tile. It decides where time goes, never the bits."""
    return _ELEMENTS_PER_THREAD * torch.get_num_threads()


def row_groups(wanted: Sequence[bool], ld: int) -> Iterator[Rows]:
    """Cut the wanted rows of `ld` elements into groups of a tile: a slice, or indices if scattered.

    Indexing a vector by a slice is a view; by indices it is a copy, to be written back.
    """
    rows = [row for row, want in enumerate(wanted) if want]
    size = max(1, tile_elements() // ld)
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        first, end = group[0], group[-1] + 1
        yield slice(first, end) if end - first == len(group) else torch.tensor(group)


def column_tiles(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut (R, ld) vectors alike along their columns, into views of a tile where R is one."""
    size = tile_elements()
    if vectors[0].shape[1] <= size:
        return iter((vectors,))
    return zip(*(vector.split(size, dim=1) for vector in vectors), strict=True)
