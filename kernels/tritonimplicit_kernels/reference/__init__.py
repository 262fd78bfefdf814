"""Every op in plain torch: the CPU path, and what the kernels are tested against."""

from __future__ import annotations

from typing import Final

from tritonimplicit_kernels.reference.anderson import anderson_dots, anderson_mix
from tritonimplicit_kernels.reference.arnoldi import arnoldi_project, arnoldi_step, multi_dot
from tritonimplicit_kernels.reference.bicgstab import (
    bicgstab_dots,
    bicgstab_half_dots,
    bicgstab_half_step,
    bicgstab_step,
    pbicgstab_step,
)
from tritonimplicit_kernels.reference.cg import cg_dots, cg_step
from tritonimplicit_kernels.reference.dense_cg import dense_cg
from tritonimplicit_kernels.reference.dots import row_dots, row_norms, row_weighted_squares
from tritonimplicit_kernels.reference.neumann import neumann_step
from tritonimplicit_kernels.reference.pcg import pcg_dots, pcg_step

__all__ = [
    "anderson_dots",
    "anderson_mix",
    "arnoldi_project",
    "arnoldi_step",
    "bicgstab_dots",
    "bicgstab_half_dots",
    "bicgstab_half_step",
    "bicgstab_step",
    "cg_dots",
    "cg_step",
    "dense_cg",
    "multi_dot",
    "name",
    "neumann_step",
    "partial_count",
    "pbicgstab_step",
    "pcg_dots",
    "pcg_step",
    "row_dots",
    "row_norms",
    "row_weighted_squares",
]

name: Final = "reference"


def partial_count(ld: int) -> int:
    """Return the number of partial sums a row: one, whatever the row's length `ld`."""
    return 1
