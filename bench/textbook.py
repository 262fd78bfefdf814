"""Conjugate gradients as a textbook writes them: the oracle in float64, a contender otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tritonimplicit_kernels.bench import unfused

Solve: TypeAlias = Callable[[Callable[[Tensor], Tensor], Tensor, int], Tensor]
"""(matvec, b, iterations) -> x, from zero, for a vector (n,) or independent rows (B, n)."""


def cg(matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """The contender: the bare lines. A system that is solved exactly goes on with 0 / 0."""
    x, r, p, rr = torch.zeros_like(b), b, b, unfused.dot(b, b)
    for _ in range(iterations):
        x, r, p, rr = unfused.cg(x, r, p, matvec(p), rr)
    return x


def guarded_cg(matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """The oracle: a system that is solved exactly stays as it is."""
    x, r, p, rr = torch.zeros_like(b), b, b, unfused.dot(b, b)
    for _ in range(iterations):
        runs = rr > 0
        after = unfused.cg(x, r, p, matvec(p), rr)
        x, r, p, rr = (torch.where(runs, *pair) for pair in zip(after, (x, r, p, rr), strict=True))
    return x


def cg_to(rtol: float) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """A solver that stops where all of ‖r‖ <= rtol ‖b‖, by the recurrence; 10 n iterations."""

    def solve(matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        x, r, p, rr = torch.zeros_like(b), b, b, unfused.dot(b, b)
        enough = rtol**2 * rr
        for _ in range(10 * b.shape[-1]):
            if not (rr > enough).any():
                break
            x, r, p, rr = unfused.cg(x, r, p, matvec(p), rr)
        return x

    return solve
