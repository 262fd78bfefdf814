"""Products with several vectors of each system at once, (k, B, ld).

On the CPU they are BLAS's, in the vectors' own precision: widened to float64 they would cost four
times as much. A user's autocast does not reach them, as each writes into memory that it is given.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.dots import row_dots

_LONG: Final = 2**14
"""Longer rows have a product of their own each, whose bits a batch cannot change."""


def row_products(vectors: Tensor, v: Tensor) -> Tensor:
    """Return vectors[j].v of each row, (B, k) float64; vectors (k, B, ld), v (B, ld)."""
    if v.device.type != "cpu":
        return torch.stack([row_dots(vector, v) for vector in vectors.unbind()], 1)
    count, batch, ld = vectors.shape
    out = v.new_empty(batch, 1, count)
    if ld <= _LONG:
        # As rows: the product with a column is many times slower.
        torch.bmm(v[:, None], vectors.permute(1, 2, 0), out=out)
    else:
        for row in range(batch):
            torch.mv(vectors[:, row], v[row], out=out[row, 0])
    return out[:, 0].double()


def less_combination(v: Tensor, scale: float, c: Tensor, vectors: Tensor, out: Tensor) -> Tensor:
    """Write scale v - sum over j of c[:, j] vectors[j] into `out` (B, ld), and return it.

    v (B, ld), c (B, k) float64, vectors (k, B, ld).
    """
    if v.device.type == "cpu":
        torch.baddbmm(
            *(v[:, None], c.to(v.dtype)[:, None], vectors.transpose(0, 1)),
            beta=scale,
            alpha=-1,
            out=out[:, None],
        )
        return out
    torch.mul(v, scale, out=out)
    for column, vector in zip(c.to(v.dtype).unbind(1), vectors.unbind(), strict=True):
        out.addcmul_(vector, column[:, None], value=-1)
    return out
