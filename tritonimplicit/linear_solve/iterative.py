"""What iterative solvers have in common: tolerances, limits, an initial guess, polls."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import optree
import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import Status, TensorTree
from tritonimplicit.linear_solve.base import (
    LinearSolver,
    check_choice,
    check_count,
    check_iterations,
    check_tolerance,
)
from tritonimplicit.linear_solve.preconditioners import (
    Jacobi,
    Nystrom,
    Preconditioner,
    check_preconditioner,
    vmapped,
)
from tritonimplicit.linear_solve.rows import RowMatvec
from tritonimplicit.vectors import Layout


@dataclass(frozen=True, kw_only=True)
class IterativeSolver(LinearSolver):
    """A solver that refines x until ‖b - A x‖ <= max(rtol ‖b‖, atol), for each system by itself.

    A residual at rounding level, eps ‖b‖ in the working precision, always counts as converged.
    `maxiter` None is min(10 n, 1000) for n unknowns a system. `init` is the initial guess (None:
    zero), shaped as b. The host asks every `check_every` iterations whether a system still runs
    (None: each iteration; 0: never, so that all of `maxiter` is done without a host
    synchronisation, if `on_failure` is "ignore"). `M`, a preconditioner, is about A^-1, ridge
    included: a linear function r -> M r on pytrees shaped as b, with b's dtypes, for all systems at
    once, or `Jacobi()` or `Nystrom(rank)`.
    """

    rtol: float = 1e-5
    atol: float = 0.0
    maxiter: int | None = None
    init: TensorTree | None = None
    check_every: int | None = None
    M: Preconditioner | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        for name in ("rtol", "atol"):
            check_tolerance(name, getattr(self, name))
        if self.maxiter is not None:
            check_iterations(self.maxiter)
        if self.check_every is not None:
            check_count("check_every", self.check_every)
        check_preconditioner(self.M)

    def iteration_limit(self, layout: Layout) -> int:
        """`maxiter`, or its default for this size."""
        return min(10 * layout.n, 1000) if self.maxiter is None else self.maxiter

    def tolerance(self, b_norm: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) float64: the residual norm at or below which a system of `dtype` has converged."""
        relative = max(self.rtol, torch.finfo(dtype).eps)
        return (relative * b_norm).clamp(min=self.atol)

    def start(self, apply: RowMatvec, b: Tensor, b_norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0 and b - A x0, both new (B, ld) buffers, and the norm of the latter, (B,)."""
        if self.init is None:
            return torch.zeros_like(b), b.clone(), b_norm
        check_init(self.init, apply.layout)
        x = apply.layout.flatten(self.init, "init")
        # A x = 0 is solved by zero, exactly; from any other start no relative tolerance can be met.
        x.masked_fill_((b_norm == 0)[:, None], 0.0)
        residual = apply.residual(x, b).clone()
        return x, residual, kernels.row_norms(residual)

    def in_graphs(self) -> bool:
        """Whether the iterations are to be captured in CUDA graphs."""
        return False

    def without_guess(self) -> IterativeSolver:
        """Return the solver with no initial guess, for another right hand side."""
        return self if self.init is None else dataclasses.replace(self, init=None)

    def transposed(self) -> IterativeSolver:
        """Return the solver for another right hand side and A^T.

        A function M is about A^-1 and serves A^T only where both are symmetric; `Jacobi` and
        `Nystrom` look at the matrix that there is.
        """
        solver = self.without_guess()
        if self.symmetric or self.M is None or isinstance(self.M, (Jacobi, Nystrom)):
            return solver
        return dataclasses.replace(solver, M=None)

    def on_leaves(self, spec: optree.PyTreeSpec) -> LinearSolver:
        """Return the solver for vectors that are tuples of the leaves of a pytree like `spec`."""
        M = self.M
        if M is None or isinstance(M, (Jacobi, Nystrom)):
            return self
        fn = M
        return dataclasses.replace(
            self, M=lambda r: tuple(optree.tree_leaves(fn(optree.tree_unflatten(spec, r))))
        )

    def vmapped(self, sizes: torch.Size) -> LinearSolver:
        """Return the solver for systems numbered by leading dimensions of these sizes as well."""
        init: TensorTree = self.init
        init = optree.tree_map(lambda t: t.expand(*sizes, *t.shape), init)
        M = vmapped(self.M, len(sizes))
        return dataclasses.replace(super().vmapped(sizes), init=init, M=M)  # type: ignore[call-arg]

    def _expected(self) -> frozenset[Status]:
        if self.rtol == 0 and self.atol == 0:  # no tolerance asked for: any residual is in order
            return frozenset({Status.MAX_ITERATIONS, Status.STAGNATED})
        return frozenset() if self.maxiter is None else frozenset({Status.MAX_ITERATIONS})


@dataclass(frozen=True, kw_only=True)
class FusedSolver(IterativeSolver):
    """A solver whose vector work is fused: it launches the kernels of `tritonimplicit_kernels`.

    `backend` is "auto" (Triton on a GPU), "reference" (plain torch) or "triton". `cuda_graph`
    captures `check_every` iterations (an even number; None: 8), matvecs included, in a CUDA graph
    and replays it; where that cannot be done there is a warning, and the solve goes on without.
    """

    backend: str = "auto"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_choice("backend", self.backend, kernels.BACKENDS)
        if not isinstance(self.cuda_graph, bool):
            raise TypeError(f"cuda_graph must be a bool, not {type(self.cuda_graph).__name__}.")
        if self.cuda_graph and (self.check_every == 0 or (self.check_every or 8) % 2):
            raise ValueError(
                "cuda_graph=True captures check_every iterations, which must be even and more "
                f"than 0, not {self.check_every}."
            )

    def in_graphs(self) -> bool:
        """Whether the iterations are to be captured in CUDA graphs."""
        return self.cuda_graph

    def backend_for(self, apply: RowMatvec, b: Tensor) -> kernels.Backend:
        """Return the backend of a solve with b (B, ld), and tell `apply` what it can read."""
        backend = kernels.backend(self.backend, b.device, b.dtype)
        # In a graph addresses are written once. Without one they have to be with each product:
        # whether that beats copying the leaves has not been measured yet (bench/leaves.py).
        if self.cuda_graph and backend.name == "triton":
            apply.read_leaves_in_place()
        return backend


def check_init(init: TensorTree, layout: Layout) -> None:
    """Raise ValueError where the initial guess and b have different shapes."""
    shapes = tuple(getattr(leaf, "shape", None) for leaf in optree.tree_leaves(init))
    if shapes != layout.shapes:
        raise ValueError(
            f"Tensors in x0 and b must have matching shapes: {shapes} vs. {layout.shapes}."
        )
