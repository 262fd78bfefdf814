"""Conjugate gradient, called with a matrix or a matvec."""

from __future__ import annotations

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linalg.matrices import as_matvec
from tritonimplicit.linear_solve import CG
from tritonimplicit.operators import Matvec


def cg(
    A: TensorTree | Matvec,
    b: TensorTree,
    x0: TensorTree | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
) -> TensorTree:
    """Solve A x = b for symmetric definite A; stops at ‖b - A x‖ <= max(rtol ‖b‖, atol).

    `A` is a square matrix, a pytree of square matrices (the diagonal blocks, one for each leaf of
    b), or v -> A v. Differentiable in b and in A, under every transform where A is no function.
    `x0` is the initial guess (zero by default), `maxiter` None is min(10 n, 1000).
    Warnings and errors are those of `linear_solve.CG`.
    """
    solver = CG(rtol=rtol, atol=atol, maxiter=maxiter, init=x0)
    return solver(as_matvec(A, b), b)
