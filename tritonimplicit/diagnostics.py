"""What a solve reports of itself: a status a system, and the warnings that follow."""

from __future__ import annotations

import enum
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
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
    """The recurrence met the tolerance, the true residual does not: rounding is the limit, or
    systems of a batch depend on each other."""
    BREAKDOWN = codes.BREAKDOWN
    """A denominator vanished (the matrix is singular, or nearly so, along the search direction)."""
    INDEFINITE = codes.INDEFINITE
    """p.Ap changed its sign: conjugate gradient needs a definite symmetric matrix."""
    DIVERGED = codes.DIVERGED
    """The residual grew instead of shrinking."""
    NON_FINITE = codes.NON_FINITE
    """NaN or infinity in b, in A, or by overflow; the value of that system is all NaN."""

    PRECONDITIONER = codes.PRECONDITIONER
    """r.M r vanished or changed its sign: the preconditioner M is not definite."""

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
        "stopped improving above the tolerance, at the limit of the working precision: loosen "
        "rtol/atol, use float64 if this is not, or add a ridge. Systems of a batch that are not "
        "independent of each other (BatchNorm, a vector without a batch) end so as well: give "
        "fewer batch_ndim"
    ),
    Status.BREAKDOWN: (
        "met a singular (or nearly singular) matrix, or numbers so small that their products "
        "vanish: add a ridge, scale the problem, or use another solver; the value is the iterate "
        "before that, with the residual that is reported (NaN from a dense solve)"
    ),
    Status.INDEFINITE: (
        "found the matrix indefinite or nonsymmetric (p.Ap changed sign), which CG cannot solve: "
        "use solve_minres or solve_gmres, or add a ridge; the value is the iterate before that, "
        "which may be far off: see its residual"
    ),
    Status.DIVERGED: (
        "diverged: the residual grew beyond what can be recovered. CG needs a symmetric definite "
        "matrix; a Neumann series needs every |1 - alpha * eigenvalue| < 1: check the sign (a "
        "fixed point z = f(z) is the root of z - f(z), not of f(z) - z), or use a smaller alpha. "
        "solve_gmres takes any matrix"
    ),
    Status.PRECONDITIONER: (
        "found the preconditioner M not symmetric and definite (r.M r vanished or changed sign): "
        "give another M, or none; the value is the last good iterate"
    ),
    Status.NON_FINITE: (
        "met NaN or infinity (in b, in the operator or M, or by overflow): its value is all NaN; "
        "look for the first non-finite loss or cotangent"
    ),
}


@dataclass(frozen=True)
class Solution:
    """A solve's result and the truth about it: of A x = b, or of a fixed point z = f(z).

    `value` has the structure, shapes and dtypes of b. `status` (int32, `Status` codes),
    `iterations` (int32) and `residual_norm` (float64, the Euclidean norm of the residual of the
    equation that was solved, ridge included; of the normal equations for normal CG) have the
    batch's shape, 0-dim without a batch. They describe the solve in its working precision; `value`
    is then rounded to b's dtype. `solver` names the method that was used: what `Auto` picked. Of a
    fixed point, b is z0, the residual is f(z) - z, and it is that of the rounded value.

    `history`, inside `record_solves` and from an iterative solver, is (iterations + 1, *batch)
    float64: the recurrence's residual norms, from that of the initial guess on; a system that has
    stopped keeps its last.
    """

    value: TensorTree
    status: Tensor
    iterations: Tensor
    residual_norm: Tensor
    solver: str
    history: Tensor | None = None

    def __repr__(self) -> str:
        """Every status with the number of its systems; the least and the most of the rest."""
        counts = torch.bincount(self.status.flatten()).tolist()
        statuses = ", ".join(f"{n} {Status(code).name}" for code, n in enumerate(counts) if n)
        least, most = (int(end) for end in self.iterations.aminmax())
        best, worst = (float(end) for end in self.residual_norm.aminmax())
        return (
            f"Solution({self.solver}, {statuses}, iterations {least} to {most}, "
            f"residual norms {best:.1e} to {worst:.1e})"
        )


class ConvergenceWarning(UserWarning):
    """A solve did not do what was asked of it; the message says what and what to do."""


class ConvergenceError(RuntimeError):
    """The same as an error, where a solver has `on_failure="raise"`; `solution` is what it got."""

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution


ON_FAILURE: Final = ("warn", "raise", "ignore")
TOLD_BY: Final = "`solver.solve(matvec, b)`, or tritonimplicit.record_solves(),"


def statuses_in(status: Tensor) -> frozenset[Status]:
    """The statuses that occur in `status`; the host reads the device once."""
    codes_of_all = torch.arange(len(Status), dtype=status.dtype, device=status.device)
    present = (status.flatten() == codes_of_all[:, None]).any(1).tolist()
    return frozenset(code for code, occurs in zip(Status, present, strict=True) if occurs)


def report_failures(
    solution: Solution,
    present: frozenset[Status],
    expected: frozenset[Status],
    on_failure: str,
    advice: Mapping[Status, str] = _ADVICE,
    told_by: str = TOLD_BY,
) -> None:
    """Warn of, or raise for, what is neither CONVERGED nor `expected` among the statuses `present`.

    One warning a status, whose text depends on the solver, the status and the number of systems
    alone, so that Python's default filter shows it once. `advice` says what each means, and
    `told_by` who knows more. Raises ConvergenceError.
    """
    failures = sorted(present - expected - {Status.CONVERGED})
    if not failures:
        return
    if on_failure == "raise":
        described = [
            _describe(solution, status, advice[status], counted=True) for status in failures
        ]
        raise ConvergenceError(f"{solution.solver}: {'; '.join(described)}.", solution)
    for status in failures:
        warnings.warn(
            f"{solution.solver}: {_describe(solution, status, advice[status], counted=False)}. "
            f"{told_by} tells the status and the residual of every system.",
            ConvergenceWarning,
            stacklevel=callers_level(),
        )


def callers_level() -> int:
    """The `stacklevel` of the innermost caller outside of this library, and of PyTorch.

    In a backward pass that is whoever called it.
    """
    inside = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def _describe(solution: Solution, status: Status, advice: str, counted: bool) -> str:
    total = solution.status.numel()
    failed = solution.status == status
    some = f"{int(failed.sum())}" if counted else "some"
    which = f"{some} of {total} systems" if total > 1 else "the system"
    if not counted:
        return f"{which} {advice}"
    return f"{which} {advice} (residual norm {float(solution.residual_norm[failed].max()):.1e})"
