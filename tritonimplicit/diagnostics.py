"""What a linear solve reports of itself: a status a system, and the warnings that follow."""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from tritonimplicit_kernels import status as codes

TensorTree: TypeAlias = Any
"""A tensor, or an optree pytree of tensors. Any, because no type takes both and still accepts a
function on plain tensors as a matvec."""


class Status(enum.IntEnum):
    """How one system's solve ended; `CONVERGED` is 0, everything else is a reason to look."""

    CONVERGED = codes.CONVERGED
    """The true residual meets the tolerance."""
    MAX_ITERATIONS = codes.MAX_ITERATIONS
    """`maxiter` iterations are done and the tolerance is not met; the value is the last iterate."""
    STAGNATED = codes.STAGNATED
    """The recurrence met the tolerance, the true residual does not: rounding is the limit."""
    BREAKDOWN = codes.BREAKDOWN
    """A denominator vanished (the matrix is singular, or nearly so, along the search direction)."""
    INDEFINITE = codes.INDEFINITE
    """p.Ap changed its sign: conjugate gradient needs a definite symmetric matrix."""
    DIVERGED = codes.DIVERGED
    """The residual grew instead of shrinking."""
    NON_FINITE = codes.NON_FINITE
    """NaN or infinity in b, in A, or by overflow; the value of that system is all NaN."""

    @property
    def advice(self) -> str:
        """What happened and what a caller can do about it, in a sentence."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "converged",
    Status.MAX_ITERATIONS: (
        "reached maxiter before the tolerance: raise maxiter, loosen rtol/atol, or add a ridge"
    ),
    Status.STAGNATED: (
        "stopped improving above the tolerance, at the limit of the working precision: "
        "use float64, loosen rtol/atol, or add a ridge"
    ),
    Status.BREAKDOWN: (
        "met a singular (or nearly singular) matrix, or numbers so small that their products "
        "vanish: add a ridge, scale the problem, or use another solver; "
        "the value is the last good iterate (NaN from a dense solve)"
    ),
    Status.INDEFINITE: (
        "found the matrix indefinite or nonsymmetric (p.Ap changed sign), which CG cannot solve: "
        "use solve_normal_cg or solve_inv, or add a ridge; the value is the last good iterate"
    ),
    Status.DIVERGED: (
        "diverged: a Neumann series needs every |1 - alpha * eigenvalue| < 1. Check the sign (a "
        "fixed point z = f(z) is the root of z - f(z), not of f(z) - z), use a smaller alpha, or "
        "another solver"
    ),
    Status.NON_FINITE: (
        "met NaN or infinity (in b, in the operator, or by overflow): its value is all NaN; "
        "look for the first non-finite loss or cotangent"
    ),
}


@dataclass(frozen=True)
class Solution:
    """A linear solve's result and the truth about it.

    `value` has the structure, shapes and dtypes of b. `status` (int32, `Status` codes),
    `iterations` (int32) and `residual_norm` (float64, the Euclidean norm of the residual of the
    equation that was solved, ridge included; of the normal equations for normal CG) have the
    batch's shape, 0-dim without a batch. They describe the solve in its working precision; `value`
    is then rounded to b's dtype.
    """

    value: TensorTree
    status: Tensor
    iterations: Tensor
    residual_norm: Tensor


class ConvergenceWarning(UserWarning):
    """A linear solve did not do what was asked of it; the message says what and what to do."""


def warn_of_failures(solution: Solution, solver: str, expected: frozenset[Status]) -> None:
    """Warn once for each status in `solution` that is neither CONVERGED nor `expected`."""
    if not bool((solution.status != Status.CONVERGED).any()):
        return
    total = solution.status.numel()
    for code in solution.status.unique().tolist():
        status = Status(code)
        if status is Status.CONVERGED or status in expected:
            continue
        failed = solution.status == code
        worst = float(solution.residual_norm[failed].max())
        which = f"{int(failed.sum())} of {total} systems" if total > 1 else "the system"
        warnings.warn(
            f"{solver}: {which} {status.advice} (residual norm {worst:.1e}). "
            "`solver.solve(matvec, b)` returns the status of every system.",
            ConvergenceWarning,
            stacklevel=3,
        )
