"""Arguments for any op, such that its systems run: what the tools call the ops with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonimplicit_kernels import ops, status
from tritonimplicit_kernels.layout import SHAPES, dtype_of

_VALUES = {
    "state": status.RUNNING,
    "threshold": 0.0,
    "limit": math.inf,
    **dict.fromkeys(("first", "second"), 0.0),  # w is orthogonal to the basis already
}
_NUMBERS = {"maxiter": 100, "slot": 0, "beta": 1.0}


def arguments(
    op: str, dtype: torch.dtype, batch: int, ld: int, partials: int, count: int = 8
) -> dict[str, Tensor | int | float]:
    """Return the arguments of `op` by name: tensors of ones, but for what stops a system.

    `count` vectors are in a basis or history, which has room for another.
    """
    assert op in ops.SCHEMAS
    sizes = {"2": 2, "B": batch, "ld": ld, "P": partials, "K": count + 1, "K + 1": count + 2}
    numbers = _NUMBERS | {"count": count}
    names = [a.name for a in getattr(torch.ops.tritonimplicit, op).default._schema.arguments]
    return {
        name: torch.full(
            [sizes[size] for size in SHAPES[name].split(", ")],
            _VALUES.get(name, 1),
            dtype=dtype_of(name, dtype),
        )
        if name in SHAPES
        else numbers[name]
        for name in names
    }
