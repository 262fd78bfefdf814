"""Fused vector kernels for batched linear solvers: vectors in, vectors out.

A registered op checks its arguments and works under torch.compile; a solver's eager loop takes
the plain functions of a `backend` instead.
"""

from __future__ import annotations

from tritonimplicit_kernels import status
from tritonimplicit_kernels.backends import BACKENDS, Backend, backend, partial_count
from tritonimplicit_kernels.leaves import LeafTables, readable
from tritonimplicit_kernels.ops import (
    anderson_dots,
    anderson_mix,
    arnoldi_project,
    arnoldi_step,
    bicgstab_dots,
    bicgstab_half_dots,
    bicgstab_half_step,
    bicgstab_step,
    cg_dots,
    cg_step,
    dense_cg,
    multi_dot,
    neumann_step,
    pbicgstab_step,
    pcg_dots,
    pcg_step,
)
from tritonimplicit_kernels.reference import row_dots, row_norms, row_weighted_squares

__all__ = [
    "BACKENDS",
    "Backend",
    "LeafTables",
    "anderson_dots",
    "anderson_mix",
    "arnoldi_project",
    "arnoldi_step",
    "backend",
    "bicgstab_dots",
    "bicgstab_half_dots",
    "bicgstab_half_step",
    "bicgstab_step",
    "cg_dots",
    "cg_step",
    "dense_cg",
    "multi_dot",
    "neumann_step",
    "partial_count",
    "pbicgstab_step",
    "pcg_dots",
    "pcg_step",
    "readable",
    "row_dots",
    "row_norms",
    "row_weighted_squares",
    "status",
]
