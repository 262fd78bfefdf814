"""Matrices, and pytrees of matrices on the diagonal, as matvecs."""

from __future__ import annotations

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_operator import LinearOperator
from tritonimplicit.operators import Matvec


def as_matvec(a: TensorTree | Matvec, b: TensorTree) -> Matvec:
    """Return v -> A v for a callable, a square matrix, or a pytree of one for each leaf of b.

    Raises TypeError for what is no square matrix, ValueError where A and b have other structures.
    """
    if callable(a):
        return a
    matrices, spec = optree.tree_flatten(a)
    for matrix in matrices:
        check_square(matrix)
    if spec != optree.tree_structure(b):
        raise ValueError(
            f"A has the structure {spec}, b has {optree.tree_structure(b)}: they must be the same."
        )
    return LinearOperator(lambda v, a: optree.tree_map(torch.matmul, a, v), a)


def check_square(matrix: object) -> None:
    """Raise TypeError unless `matrix` is a square matrix."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"Linear operator must be a matrix, not a {type(matrix).__name__}.")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        shape = tuple(matrix.shape)
        raise TypeError(f"Linear operator must be a square matrix, but has shape: {shape}")
