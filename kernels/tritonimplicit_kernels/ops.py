"""The ops, registered once with torch.library, and checked once: the way in for other code.

Sizes: B systems, rows of ld elements (ld % 16 == 0, the padding zero), P partial sums a row.
Vectors are (B, ld), all float32 or all float64; `dots` (2, B, P), `rr`, `rr_out` (B, P),
`threshold`, `limit`, `alpha`, `residual_sq` (B,) are float64; `state`, `state_out` (2, B) int32
hold a status code and the iterations done. All contiguous, on one device; vectors start at a
multiple of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonimplicit_kernels import reference
from tritonimplicit_kernels.backends import backend

_LIBRARY = torch.library.Library("tritonimplicit", "DEF")
_LIBRARY.define("cg_dots(Tensor p, Tensor ap, Tensor state, Tensor(a!) dots) -> ()")
_LIBRARY.define(
    "cg_step(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor ap, Tensor dots, Tensor rr, "
    "Tensor state, Tensor threshold, int maxiter, Tensor(d!) rr_out, Tensor(e!) state_out, "
    "Tensor(f!) residual_sq) -> ()"
)
_LIBRARY.define(
    "neumann_step(Tensor(a!) x, Tensor ax, Tensor b, Tensor alpha, Tensor rr, Tensor state, "
    "Tensor threshold, Tensor limit, int maxiter, Tensor(b!) rr_out, Tensor(c!) state_out, "
    "Tensor(d!) residual_sq) -> ()"
)

cg_dots = torch.ops.tritonimplicit.cg_dots.default
cg_step = torch.ops.tritonimplicit.cg_step.default
neumann_step = torch.ops.tritonimplicit.neumann_step.default
for _name in ("cg_dots", "cg_step", "neumann_step"):
    _LIBRARY.impl(_name, getattr(reference, _name), "CPU")
