"""The contract of a linear solver: settings in frozen fields, `solver(matvec, b)` and `.solve`."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import (
    ON_FAILURE,
    TOLD_BY,
    Solution,
    Status,
    TensorTree,
    report_failures,
    statuses_in,
)
from tritonimplicit.linear_operator import shifted
from tritonimplicit.linear_solve.direct import solve_directly
from tritonimplicit.linear_solve.family import OwnSolver
from tritonimplicit.linear_solve.graphs import stream_for_graphs
from tritonimplicit.linear_solve.rows import RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.solve_log import record
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels.layout import MOST_ITERATIONS

S = TypeVar("S", bound="LinearSolver")


@dataclass(frozen=True, kw_only=True)
class LinearSolver(OwnSolver):
    """Solves A x = b for pytrees, given v -> A v.

    `ridge` (a float, or a tensor of the batch's shape) adds ridge * I to the matrix of the system
    that the solver works on. The leading `batch_ndim` dimensions of every leaf of b index
    independent systems. `on_failure`, "warn", "raise" or "ignore", says what `solver(matvec, b)`
    does about a system that does not come to what the fields ask for. Fields are checked at
    construction: TypeError for an unknown field or a wrong type, ValueError for a value out of
    range.
    """

    ridge: float | Tensor | None = None
    batch_ndim: int = 0
    on_failure: str = "warn"

    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the fields."""
        check_count("batch_ndim", self.batch_ndim)
        check_choice("on_failure", self.on_failure, ON_FAILURE)
        ridge = self.ridge
        if isinstance(ridge, Tensor):
            if not ridge.is_floating_point():
                raise TypeError(f"ridge is a tensor of dtype {ridge.dtype}, not floating point.")
        elif ridge is not None:
            check_real("ridge", ridge)

    def __call__(self, matvec: Matvec, b: TensorTree, **overrides: Any) -> TensorTree:
        """Return x with A x = b, shaped as b; `overrides` replace fields for this call.

        Differentiable in b, in a tensor `ridge`, and in what the matvec depends on. With a
        `LinearOperator` that is to any order, forwards and backwards, and under every torch.func
        transform, vmap being one batched solve. Of a plain function, autograd (of any order, but
        not torch.func) sees the leaves that require grad and that the function reaches.

        What happens to a failure is up to `on_failure`, except for what the fields ask for
        (reaching a `maxiter` that was given, or any residual where no tolerance was): that is none.
        Raises as `solve` does, and ConvergenceError if `on_failure` is "raise".
        """
        if overrides:
            check_fields(type(self), overrides)
        solver = dataclasses.replace(self, **overrides) if overrides else self
        return solve_directly(solver, matvec, b)

    def solve(self, matvec: Matvec, b: TensorTree) -> Solution:
        """Return x with A x = b and what became of each system; not differentiable, never warns.

        Raises:
            TypeError: a matvec that is no function; a leaf of b, `init` or the matvec's result that
                is no real floating point tensor, or has another structure or dtype than b's.
            ValueError: shapes or devices that do not fit, or an empty b.
            RuntimeError: a gradient through this solve is asked for (see the message), or the
                matvec has no transpose where the solver needs one.
        """
        return self._solve(matvec, b)[0]

    def solve_plain(self, matvec: Matvec, b: TensorTree) -> TensorTree:
        """Return x with A x = b, not differentiable, and report failures as `on_failure` says."""
        return self.solve_and_report(matvec, b).value

    def solve_and_report(self, matvec: Matvec, b: TensorTree, told_by: str = TOLD_BY) -> Solution:
        """`solve`, with failures reported as `on_failure` says; `told_by` knows more of them."""
        solution, present = self._solve(matvec, b)
        if self.on_failure != "ignore":
            present = statuses_in(solution.status) if present is None else present
            report_failures(solution, present, self._expected(), self.on_failure, told_by=told_by)
        return solution

    def equation(self, matvec: Matvec, b: TensorTree) -> tuple[LinearSolver, Matvec, TensorTree]:
        """Return (solver, A, b) with the same x, with a tensor ridge in A."""
        if not isinstance(self.ridge, Tensor):
            return self, matvec, b
        check_ridge(self.ridge, Layout.of(b, self.batch_ndim))
        return self.open_ridge(), shifted(matvec, self.ridge, self.batch_ndim), b

    def open_ridge(self) -> LinearSolver:
        """Return the solver of the equation whose matrix has the ridge in it."""
        return dataclasses.replace(self, ridge=None)

    def without_guess(self) -> LinearSolver:
        """Return the solver for another right hand side, of which nothing is known."""
        return self

    def transposed(self) -> LinearSolver:
        """Return the solver for another right hand side and A^T, of which nothing is known."""
        return self.without_guess()

    def on_leaves(self, spec: optree.PyTreeSpec) -> LinearSolver:
        """Return the solver for vectors that are tuples of the leaves of a pytree like `spec`."""
        return self

    def vmapped(self, sizes: torch.Size) -> LinearSolver:
        """Return the solver for systems numbered by leading dimensions of these sizes too."""
        ridge = self.ridge
        if isinstance(ridge, Tensor) and ridge.ndim:
            ridge = ridge.expand(*sizes, *ridge.shape)
        return dataclasses.replace(self, ridge=ridge, batch_ndim=len(sizes) + self.batch_ndim)

    def _solve(self, matvec: Matvec, b: TensorTree) -> tuple[Solution, frozenset[Status] | None]:
        """`solve`, and the statuses that occur, where the host has read them already."""
        if not callable(matvec):
            raise TypeError(
                f"matvec must be a function v -> A v, not a {type(matvec).__name__}; for a matrix "
                "there is linalg.cg(A, b), or lambda v: A @ v."
            )
        layout = Layout.of(b, self.batch_ndim)
        check_not_differentiated(b)
        solver = self._choose(matvec, b, layout)
        with stream_for_graphs(getattr(solver, "cuda_graph", False), layout.device):
            rows = solver._solve_rows(matvec, b, layout)
        present = rows.present
        if (overflown := layout.overflown(rows.x)) is not None:
            rows.status.masked_fill_(overflown, Status.NON_FINITE)
            present = None
        x, residual_norm, history = rows.x, rows.residual_norm, rows.history
        if present is None or Status.NON_FINITE in present:
            nonfinite = rows.status == Status.NON_FINITE
            x.masked_fill_(nonfinite[:, None], math.nan)
            residual_norm = residual_norm.masked_fill(nonfinite, math.nan)
        solution = Solution(
            # detach: a leaf that were a view of the buffer could not be detached in place.
            value=optree.tree_map(Tensor.detach, layout.unflatten(x)),
            status=layout.per_system(rows.status),
            iterations=layout.per_system(rows.iterations),
            residual_norm=layout.per_system(residual_norm),
            solver=type(solver).__name__,
            history=None if history is None else history.view(-1, *layout.batch_shape),
        )
        record(solution)
        return solution, present

    def _choose(self, matvec: Matvec, b: TensorTree, layout: Layout) -> LinearSolver:
        """Return the solver that does it: this one, but for `Auto`."""
        return self

    @abc.abstractmethod
    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        """Solve on (B, ld) buffers."""

    def _expected(self) -> frozenset[Status]:
        """Statuses besides CONVERGED that the fields ask for."""
        return frozenset()

    def _ridge_rows(self, layout: Layout) -> float | Tensor | None:
        """Return the ridge as the rows need it: a float, or a (B, 1) tensor."""
        ridge = self.ridge
        if not isinstance(ridge, Tensor):
            return None if ridge is None else float(ridge)
        check_ridge(ridge, layout)
        return ridge.detach().to(layout.dtype).expand(layout.batch_shape).reshape(-1, 1)


def build(solver: type[S], fields: Mapping[str, Any]) -> S:
    """Return `solver(**fields)`. Raises TypeError, with the fields there are, for another."""
    check_fields(solver, fields)
    return solver(**fields)


def check_fields(solver: type[Any], fields: Mapping[str, Any]) -> None:
    """Raise TypeError for a name that is none of the solver's fields."""
    known = [field.name for field in dataclasses.fields(solver)]
    if unknown := [name for name in fields if name not in known]:
        raise TypeError(
            f"{solver.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}."
        )


def check_real(name: str, value: object) -> None:
    """Raise unless `value` is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value!r}.")


def check_count(name: str, value: object) -> None:
    """Raise unless `value` is an int that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}.")
    if value < 0:
        raise ValueError(f"{name} must not be negative, not {value}.")


def check_iterations(value: object) -> None:
    """Raise unless `value`, a `maxiter`, is a count that the systems' int32 counters can reach."""
    check_count("maxiter", value)
    if value > MOST_ITERATIONS:  # type: ignore[operator]
        raise ValueError(f"maxiter must be at most {MOST_ITERATIONS}, not {value}.")


def check_tolerance(name: str, value: object) -> None:
    """Raise unless `value` is a finite real number that is not negative."""
    check_real(name, value)
    if value < 0:  # type: ignore[operator]
        raise ValueError(f"{name} must not be negative, not {value!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}.")


def check_ridge(ridge: Tensor, layout: Layout) -> None:
    """Raise ValueError unless the ridge fits the batch."""
    if ridge.shape not in (torch.Size(), layout.batch_shape):
        raise ValueError(
            f"ridge has shape {tuple(ridge.shape)}; it must be a number, a 0-dim tensor, or "
            f"have the batch's shape {tuple(layout.batch_shape)}."
        )
    if ridge.device != layout.device:
        raise ValueError(f"ridge is on {ridge.device}; b is on {layout.device}.")


def check_not_differentiated(b: TensorTree) -> None:
    """Raise where autograd would expect `solve` to be differentiable in b."""
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in optree.tree_leaves(b)):
        raise RuntimeError(
            "b requires grad, and `solver.solve` is not differentiated: `solver(matvec, b)` is; "
            "or call it under torch.no_grad(), or with b.detach()."
        )
