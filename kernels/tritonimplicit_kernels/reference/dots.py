"""Sums along rows, in float64 and in an order that only the row's length decides.

Rows are added up many at once, in chunks too short for torch to split among threads; each tile of
a long row by BLAS, in memory that always begins at a multiple of 64 bytes; tiles in their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.tiles import TILE, column_tiles, row_groups, take

CHUNK: Final = 512
"""Elements that torch adds up in one thread, whatever else it has to add up."""
LONG: Final = 2**15
"""Elements of a row from which BLAS, a call a row, is faster."""
_ALIGNMENT: Final = 8
"""In float64 numbers: 64 bytes."""


class _Room(threading.local):
    """Scratch memory of a thread: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.memory = torch.empty(2 * TILE + 2 * _ALIGNMENT, dtype=torch.float64, device="cpu")


_ROOM: Final = _Room()


def scratch(tile: Tensor, count: int = 1) -> Tensor:
    """Return uninitialised float64 room for up to two tiles: (count, R, W), rows aligned.

    It is the thread's own, until the next call.
    """
    rows, width = tile.shape
    padded = -(-width // _ALIGNMENT) * _ALIGNMENT
    memory = _ROOM.memory
    if count * rows * padded > memory.numel():  # of a width that no tile has
        memory = memory.new_empty(count * rows * padded)
    return memory[: count * rows * padded].view(count, rows, padded)[:, :, :width]


def widen(tile: Tensor, room: Tensor) -> Tensor:
    """Return `tile` (R, W) in float64: a copy in `room`, or `tile` itself where it is."""
    return tile if tile.dtype is torch.float64 else room.copy_(tile)


def products(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """Return a.b of each row of widened tiles as (R,); `room` may be where `a` lies."""
    if a.shape[1] < LONG:
        return _by_chunk(Tensor.sum, torch.mul(a, b, out=room))
    sums = [torch.dot(x, y).tolist() for x, y in zip(a.unbind(), b.unbind(), strict=True)]
    return torch.tensor(sums, dtype=torch.float64, device="cpu")


def squares(a: Tensor) -> Tensor:
    """Return a.a of each row of a widened tile as (R,)."""
    if a.shape[1] < LONG:
        return _by_chunk(_square_sum, a)
    return products(a, a, a)


def _square_sum(a: Tensor, dim: int) -> Tensor:
    # The norm reads once what a product and its sum would read and write twice.
    norms: Tensor = torch.linalg.vector_norm(a, dim=dim)
    return norms.square_()


def _by_chunk(sums: Callable[..., Tensor], a: Tensor) -> Tensor:
    """Return the sums along each row of `a` (R, W) as (R,), `sums` being those along a chunk."""
    width = a.shape[1]
    if width <= CHUNK:
        return sums(a, 1)
    whole = width // CHUNK * CHUNK
    total = sums(a[:, :whole].unflatten(1, (-1, CHUNK)), 2).sum(1)
    return total if whole == width else total.add_(sums(a[:, whole:], 1))


def weighted_squares(a: Tensor, weights: Tensor, room: Tensor) -> Tensor:
    """Return the sum of weights a^2 of each row of a widened tile as (R,).

    `weights` is a tile of the vectors' dtype; `room` is for two, and `a` may lie in the second.
    """
    square = torch.mul(a, a, out=room[1])
    return products(widen(weights, room[0]), square, room[0])


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
    room = scratch(a, 2)
    return products(widen(a, room[0]), widen(b, room[1]), room[0])


def _weighted_squares(v: Tensor, weights: Tensor) -> Tensor:
    room = scratch(v, 2)
    return weighted_squares(widen(v, room[1]), weights, room)


def _by_tile(sums: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    out = torch.empty(vectors[0].shape[0], dtype=torch.float64, device="cpu")
    for rows in row_groups(vectors[0]):
        out[rows] = row_sums(sums(*tile) for tile in column_tiles(*take(rows, *vectors)))
    return out
