"""Sums along rows, in float64 and in an order that only the row's length decides."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.tiles import column_tiles, row_groups

# Below torch's parallel grain of 32,768: from there on torch splits the sum of a single row among
# its threads, and a row alone would be added in another order than a row in a batch.
_CHUNK = 16384


def row_sums(tiles: Iterable[Tensor]) -> Tensor:
    """Add up rows that come as float64 tiles (..., W) along their columns. Returns (...,).

    Every tile but the last must be whole chunks wide.
    """
    return torch.cat([part for terms in tiles for part in _chunk_sums(terms)], -1).sum(-1)


def row_norms(v: Tensor) -> Tensor:
    """Return the Euclidean norm of each row of `v` (B, ld) as (B,) float64.

    Squared and added in float64, where no finite float32 number over- or underflows.
    """
    if v.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)
        return norms
    squares = torch.empty(v.shape[0], dtype=torch.float64)
    for rows in row_groups([True] * v.shape[0], v.shape[1]):
        squares[rows] = row_sums(tile.double().square() for (tile,) in column_tiles(v[rows]))
    return squares.sqrt_()


def _chunk_sums(terms: Tensor) -> list[Tensor]:
    whole = terms.shape[-1] // _CHUNK * _CHUNK
    sums = [terms[..., :whole].unflatten(-1, (-1, _CHUNK)).sum(-1)] if whole else []
    if whole < terms.shape[-1]:
        sums.append(terms[..., whole:].sum(-1, keepdim=True))
    return sums
