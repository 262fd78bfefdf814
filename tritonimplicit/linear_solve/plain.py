"""What recurrences written in plain torch share: the state of the systems, never read by the host.

Their vectors are (B, ld), their scalars (B,) float64. A frozen system's vectors may turn to
anything; its x, its state and its residual norm are kept by predicate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.linear_solve.progress import Progress
from tritonimplicit.linear_solve.rows import largest
from tritonimplicit_kernels import status as codes

RowFunction: TypeAlias = Callable[[Tensor], Tensor]


def advance(
    progress: Progress,
    maxiter: int,
    *failures: tuple[int, Tensor],
    running: Tensor | None = None,
) -> Tensor:
    """Stop the systems that have ended, and return (B,) bool: those that do this step.

    `failures` are (status, (B,) bool) of what this step has met; a later one outweighs those
    before, and the end of the iterations and a residual norm below its threshold outweigh all.
    `running` (B,) is how those that go on are marked, RUNNING by default.
    """
    seen, iterations = progress.state
    rr = progress.rr[:, 0]
    code = torch.full_like(seen, codes.RUNNING) if running is None else running
    for status, failed in failures:
        code.masked_fill_(failed, status)
    code.masked_fill_(iterations >= maxiter, codes.MAX_ITERATIONS)
    code.masked_fill_(rr <= progress.threshold, codes.CONVERGED)
    code.masked_fill_(~(rr < math.inf), codes.NON_FINITE)
    runs = seen < 0
    torch.where(runs, rr, progress.residual_sq, out=progress.residual_sq)
    torch.where(runs, code, seen, out=progress.state_out[0])
    advances = progress.state_out[0] < 0
    torch.add(iterations, advances, out=progress.state_out[1])
    return advances


def record(progress: Progress, advances: Tensor, residual_sq: Tensor) -> None:
    """Hand the squared residual norms (B,) of the systems that advance to the next step."""
    progress.rr_out[:, 0].copy_(residual_sq).masked_fill_(~advances, 0.0)


def column(scalars: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) float64 as (B, 1) in the vectors' precision, rounded once."""
    return scalars.to(dtype)[:, None]


def kept(v: Tensor, rows: Tensor) -> Tensor:
    """Zero v, in place, in all rows but those of `rows` (B,) bool, whatever it was there.

    By its bits, an operation that is vectorised where torch's masked ones are not.
    """
    integer = torch.int32 if v.dtype is torch.float32 else torch.int64
    v.view(integer).bitwise_and_(-rows.to(integer)[:, None])
    return v


def scaled(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return v with its largest element in each row made 1, and what it was, (B, 1); zero stays.

    Unlike the norm, it is a number of v's own precision, whatever v.
    """
    size = largest(v)[:, None]
    return v / size.masked_fill(size == 0, 1.0), size


def normalised(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return v / ‖v‖ and ‖v‖ (B,) float64 for each row; zero stays zero."""
    v, size = scaled(v)
    norm = kernels.row_norms(v)
    return v.div_(column(norm.masked_fill(norm == 0, 1.0), v.dtype)), norm * size[:, 0]


def full_precision(device: torch.device) -> torch.autocast:
    """Without autocast, under which a user's matvec may run and batched products may not."""
    return torch.autocast(device.type, enabled=False)
