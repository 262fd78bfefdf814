"""The contract of a fixed-point solver: settings in frozen fields, `solver(f, z0)` and `.solve`."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import optree
import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import (
    ON_FAILURE,
    Solution,
    Status,
    TensorTree,
    report_failures,
    statuses_in,
)
from tritonimplicit.fixed_point.iteration import Evaluations, Iteration, unseen_derivative
from tritonimplicit.linear_solve.base import (
    check_choice,
    check_count,
    check_fields,
    check_iterations,
    check_tolerance,
)
from tritonimplicit.linear_solve.loop import SMALLEST, iterate
from tritonimplicit.linear_solve.rows import is_hidden, largest
from tritonimplicit.solve_log import record
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels import status as codes

Map: TypeAlias = Callable[[TensorTree], TensorTree]

ADVICE: Final = {
    Status.MAX_ITERATIONS: (
        "did not converge in maxiter iterations: raise maxiter, loosen rtol/atol, use another "
        "solver, or make f more of a contraction; the value is the best iterate. Samples that "
        "depend on each other (BatchNorm in training, a z without a batch) need fewer batch_ndim"
    ),
    Status.STAGNATED: (
        "converged by itself, and not with the others in their last state: samples of this batch "
        "depend on each other (BatchNorm in training, a z without a batch), and need fewer "
        "batch_ndim, in the linear solver too"
    ),
    Status.DIVERGED: (
        "diverged to NaN or infinity: use Anderson or Broyden, or make f more of a contraction; "
        "the value is the best iterate"
    ),
    Status.BREAKDOWN: (
        "is too small for its residual to be judged, below 1e-140: scale f and z; the value is the "
        "best iterate"
    ),
    Status.NON_FINITE: "met NaN or infinity in z0 or in f(z0): its value is all NaN",
}
"""What each status means and what a caller can do about it."""

_TOLD_BY: Final = "`solver.solve(f, z0)`, or tritonimplicit.record_solves(),"


@dataclass(frozen=True, kw_only=True)
class FixedPointSolver(abc.ABC):
    """Solves z = f(z) for pytrees, from z0, until ‖f(z) - z‖ <= max(rtol ‖f(z)‖, atol).

    The leading `batch_ndim` dimensions of every leaf index independent samples. Each has its own
    mixing, and stops, bitwise frozen, by itself. One that comes to no fixed point keeps its best
    iterate, that of least ‖f(z) - z‖, and does not touch the others. A residual at rounding level,
    eps ‖f(z)‖ of z0's coarsest dtype, always counts as converged.

    f is called with z0's structure and dtypes, `maxiter` + 1 times at most; vectors are kept in
    float32 at least. The host asks every `check_every` iterations whether a sample still runs
    (None: each iteration; 0: never, so that all of `maxiter` is done without a host
    synchronisation, if `on_failure` is "ignore"). `on_failure`, "warn", "raise" or "ignore", says
    what `solver(f, z0)` does about a sample that did not converge. Fields are checked at
    construction: TypeError for an unknown field or a wrong type, ValueError for a value out of
    range.
    """

    rtol: float = 1e-3
    atol: float = 0.0
    maxiter: int = 50
    batch_ndim: int = 0
    check_every: int | None = None
    on_failure: str = "warn"

    def __post_init__(self) -> None:
        """Check the fields."""
        check_tolerance("rtol", self.rtol)
        check_tolerance("atol", self.atol)
        check_iterations(self.maxiter)
        check_count("batch_ndim", self.batch_ndim)
        if self.check_every is not None:
            check_count("check_every", self.check_every)
        check_choice("on_failure", self.on_failure, ON_FAILURE)

    def __call__(self, f: Map, z0: TensorTree, **overrides: Any) -> TensorTree:
        """Return z with z = f(z), shaped as z0; `overrides` replace fields for this call.

        Not differentiable: `custom_fixed_point` gives the result its gradient. With rtol = atol = 0
        no tolerance was asked for, and ending at `maxiter` is no failure. Raises as `solve` does,
        and ConvergenceError if `on_failure` is "raise".
        """
        check_fields(type(self), overrides)
        solver = dataclasses.replace(self, **overrides)
        solution = solver.solve(f, z0)
        solver.report(solution)
        return solution.value

    def report(
        self,
        solution: Solution,
        told_by: str = _TOLD_BY,
        advice: Mapping[Status, str] = ADVICE,
    ) -> None:
        """Do what `on_failure` says of the samples that failed; `told_by` knows more of them."""
        if self.on_failure == "ignore":
            return
        free = self.rtol == 0 and self.atol == 0
        expected = frozenset({Status.MAX_ITERATIONS}) if free else frozenset()
        present = statuses_in(solution.status)
        report_failures(solution, present, expected, self.on_failure, advice, told_by)

    def solve(self, f: Map, z0: TensorTree) -> Solution:
        """Return z with z = f(z) and what became of each sample; never warns.

        f's argument is the solver's own memory, to be read during the call alone: the solver writes
        over it later. An f that keeps it keeps a clone.

        `residual_norm` is ‖f(z) - z‖ of the z that is returned. The status is CONVERGED,
        MAX_ITERATIONS, DIVERGED (NaN or infinity on the way: `value` is the best iterate),
        BREAKDOWN (float64 numbers below 1e-140, whose squares lose their digits), NON_FINITE
        (already at z0: `value` is all NaN), or STAGNATED: the sample had converged when it stopped,
        and has not where the others have come to, so f mixes the samples.

        Raises:
            TypeError: an f that is no function; a leaf of z0 or of f's result that is no real
                floating point tensor, or has another structure or dtype than z0's.
            ValueError: shapes or devices that do not fit, or an empty z0.
            RuntimeError: f changes its argument in place, or a torch.func transform is at work on
                z0 or f's result.
        """
        return self._solve(f, z0)[0]

    def in_graphs(self) -> bool:
        """No: f is anything that the user gives, dropout and Python included."""
        return False

    def _solve(self, f: Map, z0: TensorTree) -> tuple[Solution, Iteration]:
        """`solve`, and the iteration as it has ended."""
        if not callable(f):
            raise TypeError(f"f must be a function z -> f(z), not a {type(f).__name__}.")
        layout = Layout.of(z0, self.batch_ndim, "z0")
        if is_hidden(optree.tree_leaves(z0)):
            raise unseen_derivative()
        with torch.no_grad():
            rows = Evaluations(f, layout, name="f")
            iteration = self._iteration(rows, layout.flatten(z0, "z0"))
            iterate(self, iteration, self.maxiter)
            solution = self._solution(iteration, layout, rows.image)
        record(solution)
        return solution, iteration

    @abc.abstractmethod
    def _iteration(self, f: Evaluations, z: Tensor) -> Iteration:
        """The method at z (B, ld)."""

    def _solution(self, iteration: Iteration, layout: Layout, image: Tensor) -> Solution:
        """What became of it; `image` is f of the last z."""
        progress = iteration.progress
        progress.settle()
        status, iterations = progress.state
        if (lost := _unjudged(iteration)) is not None:
            status.masked_fill_(lost & (status == codes.CONVERGED), codes.BREAKDOWN)
        converged, failed = status == codes.CONVERGED, status == codes.NON_FINITE
        never = ~iteration.best_norm.isfinite()
        status = status.masked_fill(failed & ~never, codes.DIVERGED)
        z = torch.where(converged[:, None], iteration.z, iteration.best)
        norm = torch.where(converged, progress.residual_sq.sqrt(), iteration.best_norm)
        # f has evaluated those that had stopped to the end, beside the others. Twice the tolerance,
        # because f need not be bitwise repeatable.
        beside = kernels.row_norms(image - iteration.z)
        unfounded = converged & ~(beside <= 2 * progress.threshold.sqrt())
        status = status.masked_fill(unfounded, codes.STAGNATED)
        norm = torch.where(unfounded, beside, norm)
        history = progress.history
        return Solution(
            value=optree.tree_map(
                Tensor.detach, layout.unflatten(z.masked_fill_(never[:, None], math.nan))
            ),
            status=layout.per_system(status),
            iterations=layout.per_system(iterations),
            residual_norm=layout.per_system(norm.masked_fill_(never, math.nan)),
            solver=type(self).__name__,
            history=None if history is None else history.view(-1, *layout.batch_shape),
        )


def _unjudged(iteration: Iteration) -> Tensor | None:
    """(B,) whether residual and tolerance are too small to be compared by squares; None: no."""
    if iteration.z.dtype is not torch.float64:
        return None
    size = largest(iteration.residual)
    return (size > 0) & (size < SMALLEST) & (iteration.progress.threshold < SMALLEST**2)
