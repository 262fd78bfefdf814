"""Products with several vectors of each system at once, (k, B, ld).

On the CPU they are BLAS's, in the vectors' own precision: to widen them to float64 first would move
several times their bytes. As BLAS adds up a row from one end to the other, with an error that grows
with it, those of a long row are sums, in float64, of its spans'. A user's autocast does not reach
them, as each writes into memory that it is given.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.dots import row_dots

_LONG: Final = 2**14
"""Longer rows have a product of their own each, whose bits a batch cannot change."""
_SPAN: Final = 2**16
"""Elements of a row that BLAS adds up: a call is far below what it reads then."""


def row_products(vectors: Tensor, v: Tensor) -> Tensor:
    """Return vectors[j].v of each row, (k, B); vectors (k, B, ld), v (B, ld).

    They are float64; of short rows on the CPU, of the vectors' dtype.
    """
    if v.device.type != "cpu":
        return torch.stack([row_dots(vector, v) for vector in vectors.unbind()])
    count, batch, ld = vectors.shape
    if ld <= _LONG:
        # As rows: the product with a column is many times slower.
        out = v.new_empty(batch, 1, count)
        torch.bmm(v.unsqueeze(1), vectors.permute(1, 2, 0), out=out)
    else:
        spans = [slice(start, start + _SPAN) for start in range(0, ld, _SPAN)]
        parts = v.new_empty(batch, len(spans), count)
        for row in range(batch):
            for span, part in zip(spans, parts[row].unbind(), strict=True):
                torch.mv(vectors[:, row, span], v[row, span], out=part)
        out = parts.sum(1, keepdim=True, dtype=torch.float64)
    return out.squeeze(1).T


def less_combination(v: Tensor, scale: float, c: Tensor, vectors: Tensor, out: Tensor) -> Tensor:
    """Write scale v - sum over j of c[:, j] vectors[j] into `out` (B, ld), and return it.

    v (B, ld), c (B, k) of any dtype, vectors (k, B, ld).
    """
    c = c.to(v.dtype, memory_format=torch.contiguous_format)
    if v.device.type == "cpu":
        v, vectors = v.unsqueeze(1), vectors.transpose(0, 1)
        torch.baddbmm(v, c.unsqueeze(1), vectors, beta=scale, alpha=-1, out=out.unsqueeze(1))
        return out
    torch.mul(v, scale, out=out)
    for column, vector in zip(c.unbind(1), vectors.unbind(), strict=True):
        out.addcmul_(vector, column[:, None], value=-1)
    return out


def frozen(state: Tensor) -> Tensor | None:
    """Return which systems are frozen, (B,); None where the host can see at once that none is."""
    if state.device.type == "cpu" and state.numel():
        highest, _ = state.amax(1).tolist()
        if highest < 0:
            return None
    return state[0] >= 0


def write_running(out: Tensor, idle: Tensor | None, sums: Tensor) -> None:
    """Write sums (..., B) as the first of the partial sums `out` (..., B, P), zero where idle."""
    if out.shape[-1] > 1:
        out.zero_()
    first = out.select(-1, 0).copy_(sums)
    if idle is not None:
        first.masked_fill_(idle, 0.0)
