"""Arguments for any op, such that its systems run: what the tools call the ops with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonimplicit_kernels import ops, status
from tritonimplicit_kernels.layout import MAX_DENSE, SHAPES, dtype_of, shape_of

_VALUES = {
    "state": torch.tensor(status.RUNNING),
    "threshold": torch.tensor(0.0),
    "limit": torch.tensor(math.inf),
    # t.t = 2: BiCGSTAB goes on along its direction.
    "half_dots": torch.tensor([1.0, 2.0, 1.0, 1.0])[:, None, None],
    **dict.fromkeys(("first", "second"), torch.tensor(0.0)),  # w is orthogonal to the basis already
}
_NUMBERS = {"maxiter": 100, "slot": 0, "beta": 1.0}


def arguments(
    op: str, dtype: torch.dtype, batch: int, ld: int, partials: int, count: int = 8
) -> dict[str, Tensor | int | float]:
    """Return the arguments of `op` by name: tensors of ones, but for what stops a system.

    `count` vectors are in a basis or history, which has room for another.
    """
    assert op in ops.SCHEMAS
    sizes = {
        "B": batch,
        "ld": ld,
        "P": partials,
        "n": MAX_DENSE,
        "K": count + 1,
        "K + 1": count + 2,
    }
    numbers = _NUMBERS | {"count": count}
    names = [a.name for a in getattr(torch.ops.tritonimplicit, op).default._schema.arguments]

    def tensor(name: str) -> Tensor:
        ones = torch.ones(shape_of(name, sizes), dtype=dtype_of(name, dtype))
        return ones * _VALUES[name].to(ones.device) if name in _VALUES else ones

    return {name: tensor(name) if name in SHAPES else numbers[name] for name in names}
