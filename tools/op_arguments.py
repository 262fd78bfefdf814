"""Arguments for any op, such that its systems run: what the tools call the ops with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonimplicit_kernels import ops, status
from tritonimplicit_kernels.layout import SHAPES, dtype_of

_VALUES = {"state": status.RUNNING, "threshold": 0.0, "limit": math.inf}
_MAXITER = 100


def arguments(
    op: str, dtype: torch.dtype, batch: int, ld: int, partials: int
) -> dict[str, Tensor | int]:
    """Return the arguments of `op` by name: tensors of ones, but for what stops a system."""
    assert op in ops.SCHEMAS
    sizes = {"2": 2, "B": batch, "ld": ld, "P": partials}
    names = [a.name for a in getattr(torch.ops.tritonimplicit, op).default._schema.arguments]
    return {
        name: torch.full(
            [sizes[size] for size in SHAPES[name].split(", ")],
            _VALUES.get(name, 1),
            dtype=dtype_of(name, dtype),
        )
        if name in SHAPES
        else _MAXITER
        for name in names
    }
