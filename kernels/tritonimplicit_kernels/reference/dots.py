"""Sums along rows, in float64 and in an order that nothing beside the row decides.

Rows are added up many at once while they are too short for torch to split one among threads; each
tile of a long row by BLAS, in an order that its length and the threads decide, as the memory always
begins at a multiple of 64 bytes; tiles in their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.tiles import TILE, column_tiles, row_groups, take

LONG: Final = 2**15
"""Elements from which torch splits the sum of a single row among threads, and not those of many."""
WIDENED: Final = 4
"""Widened tiles for which a thread has room."""
_ALIGNMENT: Final = 8
"""In float64 numbers: 64 bytes."""
_SHAPES: Final = 16
"""Shapes of tiles for which a thread keeps its views of the scratch memory."""


@dataclass(frozen=True)
class Scratch:
    """Room for three widened tiles (R, W), whose rows begin at multiples of 64 bytes.

    `vectors` is room for one tile of the vectors' dtype, where `first` is.
    """

    first: Tensor
    second: Tensor
    third: Tensor
    vectors: Tensor


class _Room(threading.local):
    """Scratch memory of a thread: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.memory = torch.empty(
                WIDENED * (TILE + _ALIGNMENT), dtype=torch.float64, device="cpu"
            )
        self.views: dict[tuple[torch.Size, torch.dtype], Scratch] = {}


_ROOM: Final = _Room()


def scratch(tile: Tensor) -> Scratch:
    """Return uninitialised room for tiles like `tile` (R, W): the thread's, until the next call."""
    key = tile.shape, tile.dtype
    room = _ROOM.views.get(key)
    if room is None:
        whole = many(tile, 3)
        first, second, third = whole
        room = Scratch(first, second, third, whole[0].view(tile.dtype)[:, : tile.shape[1]])
        if first.data_ptr() != _ROOM.memory.data_ptr():  # of a width that no tile has
            return room
        if len(_ROOM.views) == _SHAPES:
            _ROOM.views.clear()
        _ROOM.views[key] = room
    return room


def many(tile: Tensor, count: int) -> Tensor:
    """Return uninitialised float64 room for `count` tiles like `tile`, (count, R, W), as `scratch`.

    It is the same memory.
    """
    rows, width = tile.shape
    padded = -(-width // _ALIGNMENT) * _ALIGNMENT
    memory = _ROOM.memory
    if count * rows * padded > memory.numel():
        memory = memory.new_empty(count * rows * padded)
    return memory[: count * rows * padded].view(count, rows, padded)[:, :, :width]


def widen(tile: Tensor, room: Tensor) -> Tensor:
    """Return `tile` (R, W) in float64: a copy in `room`, or `tile` itself where it is."""
    return tile if tile.dtype is torch.float64 else room.copy_(tile)


def products(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """Return a.b of each row of widened tiles as (R,); `room` may be where `a` lies."""
    return _blas(a, b) if a.shape[1] >= LONG else torch.mul(a, b, out=room).sum(-1)


def squares(a: Tensor) -> Tensor:
    """Return a.a of each row of a widened tile as (R,)."""
    if a.shape[1] >= LONG:
        return _blas(a, a)
    # The norm reads once what a product and its sum would read and write twice.
    norms: Tensor = torch.linalg.vector_norm(a, dim=-1)
    return norms.square_()


def weighted_squares(a: Tensor, weights: Tensor, room: Scratch) -> Tensor:
    """Return the sum of weights a^2 of each row of a widened tile as (R,).

    `weights` is a tile of the vectors' dtype; `a` may be where the second part of `room` is.
    """
    square = torch.mul(a, a, out=room.second)
    return products(widen(weights, room.first), square, room.first)


def _blas(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([torch.dot(x, y) for x, y in zip(a.unbind(), b.unbind(), strict=True)])


def row_sums(tiles: Iterable[Tensor]) -> Tensor:
    """Add up the sums (..., R) of rows that come in tiles along their columns: (..., R)."""
    sums = list(tiles)
    return sums[0] if len(sums) == 1 else torch.stack(sums, -1).sum(-1)


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
    return _by_tile(lambda tile: squares(widen(tile, scratch(tile).first)), v)


def row_weighted_squares(v: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of weights v^2 of each row of `v` and `weights` (B, ld) as (B,) float64.

    Multiplied and added in float64, as `row_dots` does.
    """
    if v.device.type != "cpu":
        return (weights.double() * v.double().square()).sum(1)
    return _by_tile(_weighted_squares, v, weights)


def row_norms(v: Tensor) -> Tensor:
    """Return the Euclidean norm of each row of `v` (B, ld) as (B,) float64.

    Squared and added in float64, where no finite float32 number over- or underflows.
    """
    return row_squares(v).sqrt_()


def _dots(a: Tensor, b: Tensor) -> Tensor:
    room = scratch(a)
    return products(widen(a, room.first), widen(b, room.second), room.first)


def _weighted_squares(v: Tensor, weights: Tensor) -> Tensor:
    room = scratch(v)
    return weighted_squares(widen(v, room.second), weights, room)


def _by_tile(sums: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    groups = [
        row_sums(sums(*tile) for tile in column_tiles(*take(rows, *vectors)))
        for rows in row_groups(vectors[0])
    ]
    if not groups:
        return torch.empty(0, dtype=torch.float64, device="cpu")
    return groups[0] if len(groups) == 1 else torch.cat(groups)
