"""The Neumann series, called with a matrix or a matvec."""

from __future__ import annotations

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linalg.matrices import as_matvec, check_square
from tritonimplicit.linear_operator import LinearOperator
from tritonimplicit.linear_solve import Neumann
from tritonimplicit.operators import Matvec


def ns(
    A: TensorTree | Matvec,
    b: TensorTree,
    maxiter: int | None = None,
    *,
    alpha: float | None = None,
) -> TensorTree:
    """Approximate A^-1 b by alpha * sum over k = 0 .. maxiter of (I - alpha A)^k b.

    `A` as in `cg`, but it need not be symmetric; derivatives are those of A^-1 b.
    `maxiter` None is 10, `alpha` None is 1. Warnings and errors are those of
    `linear_solve.Neumann`.
    """
    return Neumann(maxiter=maxiter, alpha=alpha)(as_matvec(A, b), b)


def ns_inv(
    A: TensorTree,
    maxiter: int | None = None,
    *,
    alpha: float | None = None,
) -> TensorTree:
    """Approximate the inverse of each matrix of the pytree `A` by the first `maxiter` terms.

    `maxiter` None is 10: one term fewer than `ns` takes. `alpha` None is 1.
    """
    terms = 10 if maxiter is None else maxiter

    def invert(matrix: Tensor) -> Tensor:
        check_square(matrix)
        if terms == 0:
            return torch.zeros_like(matrix)
        # One system a row: row i of the solution is column i of the inverse.
        identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        series = Neumann(maxiter=terms - 1, alpha=alpha, batch_ndim=1)
        columns: Tensor = series(LinearOperator(lambda v, a: v @ a.mT, matrix), identity)
        return columns.mT

    return optree.tree_map(invert, A)
