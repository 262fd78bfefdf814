"""The contract of a linear solver: settings in frozen fields, `solver(matvec, b)` and `.solve`."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import Solution, Status, TensorTree, warn_of_failures
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout

Solve: TypeAlias = Callable[[Matvec, Any], Any]
"""What solves A x = b: (matvec, b) -> x. Ours, TorchOpt's, or any function of that form."""


@dataclass(frozen=True, kw_only=True)
class LinearSolver(abc.ABC):
    """Solves A x = b for pytrees, given v -> A v.

    `ridge` (a float, or a tensor of the batch's shape) adds ridge * I to the matrix of the system
    that the solver works on. The leading `batch_ndim` dimensions of every leaf of b index
    independent systems. Fields are checked at construction: TypeError for an unknown field or a
    wrong type, ValueError for a value out of range.
    """

    ridge: float | Tensor | None = None
    batch_ndim: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_count("batch_ndim", self.batch_ndim)
        ridge = self.ridge
        if isinstance(ridge, Tensor):
            if not ridge.is_floating_point():
                raise TypeError(f"ridge is a tensor of dtype {ridge.dtype}, not floating point.")
            if ridge.requires_grad:
                raise ValueError(
                    "ridge requires grad, but no gradient flows into a solver's fields: give "
                    "ridge.detach(), or write the ridge into the matvec or the optimality."
                )
        elif ridge is not None:
            check_real("ridge", ridge)

    def __call__(self, matvec: Matvec, b: TensorTree, **overrides: Any) -> TensorTree:
        """Return x with A x = b, shaped as b; `overrides` replace fields for this call.

        Emits a `ConvergenceWarning` for each kind of failure, except for what the fields ask for
        (reaching a `maxiter` that was given, or any residual where no tolerance was). Raises as
        `solve` does.
        """
        solver = dataclasses.replace(self, **overrides) if overrides else self
        solution = solver.solve(matvec, b)
        warn_of_failures(solution, type(self).__name__, solver._expected())
        return solution.value

    def solve(self, matvec: Matvec, b: TensorTree) -> Solution:
        """Return x with A x = b and what became of each system; never warns.

        Raises:
            TypeError: a matvec that is no function; a leaf of b, `init` or the matvec's result that
                is no real floating point tensor, or has another structure or dtype than b's.
            ValueError: shapes or devices that do not fit, or an empty b.
            RuntimeError: a gradient through this solve is asked for (see the message), or the
                matvec has no transpose where the solver needs one.
        """
        if not callable(matvec):
            raise TypeError(
                f"matvec must be a function v -> A v, not a {type(matvec).__name__}; for a matrix "
                "there is linalg.cg(A, b), or lambda v: A @ v."
            )
        layout = Layout.of(b, self.batch_ndim)
        check_not_differentiated(b)
        rows = self._solve_rows(matvec, b, layout)
        nonfinite = rows.status == Status.NON_FINITE
        x = rows.x.masked_fill_(nonfinite[:, None], math.nan)
        return Solution(
            # detach: a leaf that were a view of the buffer could not be detached in place.
            value=optree.tree_map(Tensor.detach, layout.unflatten(x)),
            status=layout.per_system(rows.status),
            iterations=layout.per_system(rows.iterations),
            residual_norm=layout.per_system(rows.residual_norm.masked_fill(nonfinite, math.nan)),
        )

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
        if ridge.shape not in (torch.Size(), layout.batch_shape):
            raise ValueError(
                f"ridge has shape {tuple(ridge.shape)}; it must be a number, a 0-dim tensor, or "
                f"have the batch's shape {tuple(layout.batch_shape)}."
            )
        if ridge.device != layout.device:
            raise ValueError(f"ridge is on {ridge.device}; b is on {layout.device}.")
        return ridge.to(layout.dtype).expand(layout.batch_shape).reshape(layout.systems, 1)


@dataclass(frozen=True, kw_only=True)
class IterativeSolver(LinearSolver):
    """A solver that refines x until ‖b - A x‖ <= max(rtol ‖b‖, atol), for each system by itself.

    A residual at rounding level, eps ‖b‖ in the working precision, always counts as converged.
    `maxiter` None is min(10 n, 1000) for n unknowns a system. `init` is the initial guess (None:
    zero), shaped as b. The host asks every `check_every` iterations whether a system still runs
    (None: each iteration; 0: never, so that all of `maxiter` is done without a host
    synchronisation). `backend` is "auto", "reference" (plain torch) or "triton".
    """

    rtol: float = 1e-5
    atol: float = 0.0
    maxiter: int | None = None
    init: TensorTree | None = None
    check_every: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        for name in ("rtol", "atol"):
            check_real(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)!r}.")
        for name in ("maxiter", "check_every"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.backend not in kernels.BACKENDS:
            names = ", ".join(map(repr, kernels.BACKENDS))
            raise ValueError(f"backend must be one of {names}, not {self.backend!r}.")

    def iteration_limit(self, layout: Layout) -> int:
        """`maxiter`, or its default for this size."""
        return min(10 * layout.n, 1000) if self.maxiter is None else self.maxiter

    def tolerance(self, b_norm: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) float64: the residual norm at or below which a system of `dtype` has converged."""
        relative = max(self.rtol, torch.finfo(dtype).eps)
        return (relative * b_norm).clamp(min=self.atol)

    def start(self, apply: RowMatvec, b: Tensor, b_norm: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and b - A x0, both new (B, ld) buffers."""
        if self.init is None:
            return torch.zeros_like(b), b.clone()
        check_init(self.init, apply.layout)
        x = apply.layout.flatten(self.init, "init")
        # A x = 0 is solved by zero, exactly; from any other start no relative tolerance can be met.
        x.masked_fill_((b_norm == 0)[:, None], 0.0)
        return x, apply.residual(x, b).clone()

    def _expected(self) -> frozenset[Status]:
        if self.rtol == 0 and self.atol == 0:  # no tolerance asked for: any residual is in order
            return frozenset({Status.MAX_ITERATIONS, Status.STAGNATED})
        return frozenset() if self.maxiter is None else frozenset({Status.MAX_ITERATIONS})


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


def check_init(init: TensorTree, layout: Layout) -> None:
    """Raise ValueError where the initial guess and b have different shapes."""
    shapes = tuple(getattr(leaf, "shape", None) for leaf in optree.tree_leaves(init))
    if shapes != layout.shapes:
        raise ValueError(
            f"Tensors in x0 and b must have matching shapes: {shapes} vs. {layout.shapes}."
        )


def check_not_differentiated(b: TensorTree) -> None:
    """Raise where autograd would expect this solve to be differentiable in b."""
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in optree.tree_leaves(b)):
        raise RuntimeError(
            "b requires grad, but a solver called directly is not differentiated: call it under "
            "torch.no_grad() or with b.detach(); custom_root gives gradients through a solution."
        )
