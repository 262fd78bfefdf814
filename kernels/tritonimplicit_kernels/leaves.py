"""Vectors of several tensors, read where these lie: the table that the Triton kernels follow.

A row of such a vector is laid out as any other: leaf i has the elements from `starts[i]`, a
multiple of 16, on. But it is nowhere in one piece: in the place of the rows of a product, a
Triton kernel takes a table, int64,

    [address of the owners; then of each leaf: origin, stride, end, code]

with owners (ld / 16,) int32, which leaf a group of 16 elements belongs to; origin, the address that
element 0 of the first system's row would have, were all of the row the leaf's; stride, the bytes
from one system to the next; end, the first element of a row that is not the leaf's any more (what
is left of its last group is padding: zero); code, the place of its dtype in `DTYPES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

GROUP: Final = 16
RECORD: Final = 4
DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def readable(leaf: Tensor) -> bool:
    """Say whether `leaf` (B, size) can be read where it lies: each system's elements in one piece.

    Any alignment will do, and any distance from system to system.
    """
    return (leaf.stride(1) == 1 or leaf.shape[1] <= 1) and not leaf.is_neg()


class LeafTables:
    """Makes the tables of vectors whose leaves lie alike in a row of `ld` elements.

    `starts` and `sizes` are the leaves' in elements; a leaf is given as (B, size). `dtype` is that
    of the vectors which a step updates: float32 or float64.
    """

    def __init__(
        self,
        starts: Sequence[int],
        sizes: Sequence[int],
        ld: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self._starts, self._sizes = tuple(starts), tuple(sizes)
        known = DTYPES if dtype is torch.float64 else DTYPES[:-1]
        self._codes = {leaf_dtype: code for code, leaf_dtype in enumerate(known)}
        groups = torch.tensor([*starts, ld], device="cpu").diff() // GROUP
        numbers = torch.arange(len(starts), dtype=torch.int32, device="cpu")
        self._owners = numbers.repeat_interleave(groups).to(device)
        # Two words at a time: each table of a reserve starts at a multiple of 16 bytes.
        self._width = -(-(1 + RECORD * len(self._starts)) // 2) * 2
        self._reserve = torch.empty(0, self._width, dtype=torch.int64, device=device)
        self._unwritten: list[list[int]] = []
        self._of_graphs: list[Tensor] = []

    def reserve(self, count: int) -> None:
        """Make memory for `count` tables, to be called before a graph that has them is captured.

        What is made in a capture shares the graph's memory with what was freed earlier in it, such
        as a matvec's temporaries, which every replay writes again.
        """
        self._reserve = self._reserve.new_empty(count, self._width)
        self._unwritten.clear()  # of a capture that failed

    def table(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return the table of these leaves, each `readable` and no wider than the vectors' dtype.

        It holds as long as they are kept alive. In a graph that is being captured it is the next of
        those reserved: `write` fills it once the capture has ended, so that no replay has to.

        Raises TypeError for a leaf of a dtype that the vectors cannot hold, RuntimeError in a graph
        with more tables than were reserved.
        """
        words = [self._owners.data_ptr()]
        for leaf, start, size in zip(leaves, self._starts, self._sizes, strict=True):
            origin = leaf.data_ptr() - start * leaf.element_size()
            stride = leaf.stride(0) * leaf.element_size()
            words += [origin, stride, start + size, self._code(leaf)]
        device = self._owners.device
        if _captures(device):
            return self._reserved(words)
        host = torch.tensor(words, device="cpu", pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)

    def _reserved(self, words: list[int]) -> Tensor:
        taken, count = len(self._unwritten), len(self._reserve)
        if taken == count:
            raise RuntimeError(
                f"a graph has more tables than the {count} reserved: call `reserve` with their "
                "number before the capture"
            )
        self._unwritten.append(words)
        return self._reserve[taken, : len(words)]

    def _code(self, leaf: Tensor) -> int:
        code = self._codes.get(leaf.dtype)
        if code is None:
            known = ", ".join(map(str, self._codes))
            raise TypeError(f"a leaf must be one of {known}, not {leaf.dtype}: convert it")
        return code

    def write(self) -> None:
        """Fill the tables of a graph that has been captured, on the stream that will replay it."""
        if not self._unwritten:
            return
        words = torch.tensor(self._unwritten, device="cpu")
        self._reserve[: len(words), : words.shape[1]].copy_(words)
        self._of_graphs.append(self._reserve)  # kept: the graph has its address alone
        self.reserve(0)


def _captures(device: torch.device) -> bool:
    """Whether a graph is being captured from the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
