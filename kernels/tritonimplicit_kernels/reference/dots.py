"""Sums along rows, in float64 and in an order that only the row's length decides.

A row is added up by chunks, the chunks of a tile next, the tiles last. None of these sums is long
enough for torch to split it among threads: from 32,768 elements on it would, if the row is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.tiles import column_tiles, row_groups, take

CHUNK: Final = 2048


def scratch(tile: Tensor, count: int = 1) -> Tensor:
    """Return uninitialised float64 room for `count` tiles (R, W), their rows in whole chunks.

    One allocation for a tile's every need: large ones that come and go together make the allocator
    return memory to the system, which costs more than the step.
    """
    rows, width = tile.shape
    padded = width if width <= CHUNK else -(-width // CHUNK) * CHUNK
    return torch.empty((count, rows, padded), dtype=torch.float64, device="cpu")


def widen(tile: Tensor, room: Tensor) -> Tensor:
    """Return `tile` (R, W) in float64, padded with zeros to the width of `room`.

    It is a copy in `room`, or `tile` itself where that is both.
    """
    width = tile.shape[1]
    if room.shape[1] == width:
        return tile if tile.dtype is torch.float64 else room.copy_(tile)
    room[:, width:].zero_()
    room[:, :width].copy_(tile)
    return room


def products(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """Return a.b of each row of widened tiles as (R,); `room` may be where `a` lies."""
    product = torch.mul(a, b, out=room)
    return product.sum(1) if product.shape[1] <= CHUNK else _chunks(product).sum(2).sum(1)


def squares(a: Tensor) -> Tensor:
    """Return a.a of each row of a widened tile as (R,)."""
    # The norm reads once what a product and its sum would read and write twice.
    if a.shape[1] <= CHUNK:
        norms: Tensor = torch.linalg.vector_norm(a, dim=1)
        return norms.square_()
    norms = torch.linalg.vector_norm(_chunks(a), dim=2)
    return norms.square_().sum(1)


def row_sums(tiles: Iterable[Tensor]) -> Tensor:
    """Add up the sums (R,) of rows that come in tiles along their columns: (R,)."""
    sums = list(tiles)
    return sums[0] if len(sums) == 1 else torch.stack(sums, 1).sum(1)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return a.b of each row of `a` and `b` (B, ld) as (B,) float64.

    Multiplied and added in float64, where no finite float32 number over- or underflows.
    """
    if a.device.type != "cpu":
        return (a.double() * b.double()).sum(1)
    return _by_tile(_dots, a, b)


def row_squares(v: Tensor) -> Tensor:
    """Return v.v of each row of `v` (B, ld) as (B,) float64, as `row_dots` does."""
    if v.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)
        return norms.square_()
    return _by_tile(lambda tile: squares(widen(tile, scratch(tile)[0])), v)


def row_norms(v: Tensor) -> Tensor:
    """Return the Euclidean norm of each row of `v` (B, ld) as (B,) float64.

    Squared and added in float64, where no finite float32 number over- or underflows.
    """
    return row_squares(v).sqrt_()


def _dots(a: Tensor, b: Tensor) -> Tensor:
    room = scratch(a, 2)
    return products(widen(a, room[0]), widen(b, room[1]), room[0])


def _by_tile(sums: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    out = torch.empty(vectors[0].shape[0], dtype=torch.float64)
    for rows in row_groups(vectors[0]):
        out[rows] = row_sums(sums(*tile) for tile in column_tiles(*take(rows, *vectors)))
    return out


def _chunks(a: Tensor) -> Tensor:
    return a.reshape(a.shape[0], -1, CHUNK)
