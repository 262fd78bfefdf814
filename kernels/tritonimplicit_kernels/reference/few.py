"""What a step decides for a few systems on a CPU, in Python's floats, as `rules` does.

The four dozen torch calls of `rules` cost more than the vectors' work where systems are small, and
from the first that stops on a solve has some that are frozen beside others that run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.reference.common import go_on

MOST: Final = 128
"""Systems for which lists of floats take as long as torch's calls."""


def are_few(state: Tensor) -> bool:
    """Whether `state` (2, B) is of systems for which this is the way."""
    return state.device.type == "cpu" and 0 < state.shape[1] <= MOST


def decide_neumann(
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
) -> list[bool]:
    """Settle the state; return which systems advance."""
    rr_b = rr.sum(-1)  # (B,)
    seen, iterations = state.tolist()
    numbers = zip(rr_b.tolist(), threshold.tolist(), limit.tolist(), strict=True)
    codes = [
        _neumann_code(code, count, *number, maxiter)
        for code, count, number in zip(seen, iterations, numbers, strict=True)
    ]
    return _settle(codes, seen, iterations, rr_b, state, state_out, residual_sq)


def decide_arnoldi(
    size_sq: Tensor,
    singular: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
) -> list[bool]:
    """Settle the state; return which systems advance."""
    seen, iterations = state.tolist()
    numbers = zip(rr.tolist(), threshold.tolist(), size_sq.tolist(), singular.tolist(), strict=True)
    codes = [
        _arnoldi_code(code, count, *number, maxiter)
        for code, count, number in zip(seen, iterations, numbers, strict=True)
    ]
    return _settle(codes, seen, iterations, rr, state, state_out, residual_sq)


def _neumann_code(
    seen: int, iterations: int, rr: float, threshold: float, limit: float, maxiter: int
) -> int:
    """Say what a system turns to; the first rule that holds wins."""
    if seen >= 0:
        return seen
    if not rr < math.inf:
        return status.NON_FINITE
    if rr <= threshold:
        return status.CONVERGED
    if rr > limit:
        return status.DIVERGED
    return status.MAX_ITERATIONS if iterations >= maxiter else status.RUNNING


def _arnoldi_code(
    seen: int,
    iterations: int,
    rr: float,
    threshold: float,
    size_sq: float,
    singular: bool,
    maxiter: int,
) -> int:
    """Say what a system turns to; the first rule that holds wins."""
    if seen >= 0:
        return seen
    if not rr < math.inf:
        return status.NON_FINITE
    if rr <= threshold:
        return status.CONVERGED
    if iterations >= maxiter:
        return status.MAX_ITERATIONS
    if not size_sq < math.inf:
        return status.NON_FINITE
    return status.BREAKDOWN if singular else status.RUNNING


def _settle(
    codes: list[int],
    seen: list[int],
    iterations: Sequence[int],
    rr: Tensor,
    state: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> list[bool]:
    """Write what the systems have come to, frozen ones kept; return which advance."""
    advances = [code < 0 for code in codes]
    if codes == seen and all(advances):
        go_on(rr, state, state_out, residual_sq)
        return advances
    done = [count + more for count, more in zip(iterations, advances, strict=True)]
    state_out.copy_(torch.tensor([codes, done], dtype=torch.int32, device="cpu"))
    torch.where(state[0] < 0, rr, residual_sq, out=residual_sq)
    return advances
