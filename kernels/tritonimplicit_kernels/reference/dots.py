"""Sums along rows, in float64 and in an order that only the row's length decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.tiles import column_tiles, row_groups

# Below torch's parallel grain of 32,768: from there on torch splits the sum of a single row among
# its threads, and a row alone would be added in another order than a row in a batch.
_CHUNK = 16384


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Return a.b of each chunk of the rows of float64 tiles: (R, W) -> (R, chunks)."""
    return _by_chunk(lambda a, b: (a * b).sum(-1), a, b)


def squares(a: Tensor) -> Tensor:
    """Return a.a of each chunk of the rows of a float64 tile: (R, W) -> (R, chunks)."""
    # The norm reads once what a product and its sum would read and write twice.
    return _by_chunk(lambda a: torch.linalg.vector_norm(a, dim=-1).square_(), a)


def row_sums(tiles: Iterable[Tensor]) -> Tensor:
    """Add up the chunks (R, chunks) of rows that come in tiles along their columns: (R,).

    Every tile but the last must be whole chunks wide.
    """
    sums = list(tiles)
    if len(sums) == 1 and sums[0].shape[1] == 1:
        return sums[0][:, 0]
    return torch.cat(sums, 1).sum(1)


def row_norms(v: Tensor) -> Tensor:
    """Return the Euclidean norm of each row of `v` (B, ld) as (B,) float64.

    Squared and added in float64, where no finite float32 number over- or underflows.
    """
    if v.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)
        return norms
    rr = torch.empty(v.shape[0], dtype=torch.float64)
    for rows in row_groups([True] * v.shape[0], v.shape[1]):
        rr[rows] = row_sums(squares(tile.double()) for (tile,) in column_tiles(v[rows]))
    return rr.sqrt_()


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return a.b of each row of `a` and `b`, (B, ld) each, as (B,) float64.

    Multiplied and added in float64, as by `row_norms`.
    """
    if a.device.type != "cpu":
        return (a.double() * b.double()).sum(1)
    ab = torch.empty(a.shape[0], dtype=torch.float64)
    for rows in row_groups([True] * a.shape[0], a.shape[1]):
        tiles = column_tiles(a[rows], b[rows])
        ab[rows] = row_sums(dots(a.double(), b.double()) for a, b in tiles)
    return ab


def _by_chunk(reduce: Callable[..., Tensor], *tiles: Tensor) -> Tensor:
    width = tiles[0].shape[1]
    whole = width // _CHUNK * _CHUNK
    parts = []
    if whole:
        parts.append(reduce(*(tile[:, :whole].unflatten(1, (-1, _CHUNK)) for tile in tiles)))
    if whole < width:
        parts.append(reduce(*(tile[:, whole:] for tile in tiles))[:, None])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
