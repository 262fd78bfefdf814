"""The ops as Triton kernels. Imported only when first needed: triton is optional."""

from __future__ import annotations

from typing import Final

import triton

from tritonimplicit_kernels.triton.anderson_dots import anderson_dots
from tritonimplicit_kernels.triton.anderson_mix import anderson_mix
from tritonimplicit_kernels.triton.arnoldi_project import arnoldi_project
from tritonimplicit_kernels.triton.arnoldi_step import arnoldi_step
from tritonimplicit_kernels.triton.bicgstab_dots import bicgstab_dots
from tritonimplicit_kernels.triton.bicgstab_half_dots import bicgstab_half_dots
from tritonimplicit_kernels.triton.bicgstab_half_step import bicgstab_half_step
from tritonimplicit_kernels.triton.bicgstab_step import bicgstab_step
from tritonimplicit_kernels.triton.cg_dots import _cg_dots_kernel, cg_dots
from tritonimplicit_kernels.triton.cg_step import cg_step
from tritonimplicit_kernels.triton.dense_cg import dense_cg
from tritonimplicit_kernels.triton.launch import partial_count
from tritonimplicit_kernels.triton.multi_dot import multi_dot
from tritonimplicit_kernels.triton.neumann_step import neumann_step
from tritonimplicit_kernels.triton.pbicgstab_step import pbicgstab_step
from tritonimplicit_kernels.triton.pcg_dots import pcg_dots
from tritonimplicit_kernels.triton.pcg_step import pcg_step

__all__ = [
    "INTERPRETED",
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
]

name: Final = "triton"

# Whether the kernels run in Triton's interpreter, on the CPU: decided when they were defined.
INTERPRETED: Final = not isinstance(_cg_dots_kernel, triton.JITFunction)
