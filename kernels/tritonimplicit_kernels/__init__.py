"""Fused vector kernels for batched linear solvers: vectors in, vectors out."""

from __future__ import annotations

from tritonimplicit_kernels import status
from tritonimplicit_kernels.backends import BACKENDS, Backend, backend
from tritonimplicit_kernels.ops import cg_dots, cg_step, neumann_step
from tritonimplicit_kernels.reference import row_norms

__all__ = [
    "BACKENDS",
    "Backend",
    "backend",
    "cg_dots",
    "cg_step",
    "neumann_step",
    "row_norms",
    "status",
]
