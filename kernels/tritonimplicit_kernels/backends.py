"""Which functions do the work on a device: `backend(name, device, dtype)`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final, Protocol

import torch
from torch import Tensor

from tritonimplicit_kernels import reference

BACKENDS: Final = ("auto", "reference", "triton")


class Backend(Protocol):
    """The plain functions of one backend, without the argument checks of the registered ops.

    An eager solver loop calls these directly; the layouts are those of `tritonimplicit_kernels`.
    Those of "triton" take a table of `LeafTables` too in the place of a product.
    """

    @property
    def name(self) -> str:
        """Return "reference" or "triton"."""
        ...

    def partial_count(self, ld: int) -> int:
        """Return P, the number of partial sums a row of `ld` elements."""
        ...

    def cg_dots(self, p: Tensor, ap: Tensor, state: Tensor, dots: Tensor) -> None:
        """Do `tritonimplicit_kernels.cg_dots`, unchecked."""
        ...

    def cg_step(
        self,
        x: Tensor,
        r: Tensor,
        p: Tensor,
        ap: Tensor,
        dots: Tensor,
        rr: Tensor,
        state: Tensor,
        threshold: Tensor,
        maxiter: int,
        rr_out: Tensor,
        state_out: Tensor,
        residual_sq: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.cg_step`, unchecked."""
        ...

    def pcg_dots(self, p: Tensor, ap: Tensor, d: Tensor, state: Tensor, dots: Tensor) -> None:
        """Do `tritonimplicit_kernels.pcg_dots`, unchecked."""
        ...

    def pcg_step(
        self,
        x: Tensor,
        r: Tensor,
        p: Tensor,
        ap: Tensor,
        d: Tensor,
        dots: Tensor,
        rr: Tensor,
        rz: Tensor,
        state: Tensor,
        threshold: Tensor,
        maxiter: int,
        rr_out: Tensor,
        rz_out: Tensor,
        state_out: Tensor,
        residual_sq: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.pcg_step`, unchecked."""
        ...

    def bicgstab_dots(
        self,
        shadow: Tensor,
        v: Tensor,
        state: Tensor,
        shadow_dots: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.bicgstab_dots`, unchecked."""
        ...

    def bicgstab_half_step(
        self,
        r: Tensor,
        v: Tensor,
        shadow_dots: Tensor,
        rho: Tensor,
        rr: Tensor,
        state: Tensor,
        threshold: Tensor,
        limit: Tensor,
        maxiter: int,
        alpha: Tensor,
        ss: Tensor,
        state_out: Tensor,
        residual_sq: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.bicgstab_half_step`, unchecked."""
        ...

    def bicgstab_half_dots(
        self,
        shadow: Tensor,
        s: Tensor,
        t: Tensor,
        state: Tensor,
        half_dots: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.bicgstab_half_dots`, unchecked."""
        ...

    def bicgstab_step(
        self,
        x: Tensor,
        r: Tensor,
        p: Tensor,
        shadow: Tensor,
        v: Tensor,
        t: Tensor,
        shadow_dots: Tensor,
        ss: Tensor,
        half_dots: Tensor,
        alpha: Tensor,
        unit: Tensor,
        threshold: Tensor,
        state: Tensor,
        rho: Tensor,
        rr_out: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.bicgstab_step`, unchecked."""
        ...

    def pbicgstab_step(
        self,
        x: Tensor,
        r: Tensor,
        p: Tensor,
        shadow: Tensor,
        y: Tensor,
        z: Tensor,
        v: Tensor,
        t: Tensor,
        shadow_dots: Tensor,
        ss: Tensor,
        half_dots: Tensor,
        alpha: Tensor,
        unit: Tensor,
        threshold: Tensor,
        state: Tensor,
        rho: Tensor,
        rr_out: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.pbicgstab_step`, unchecked."""
        ...

    def dense_cg(
        self,
        a: Tensor,
        rhs: Tensor,
        threshold: Tensor,
        maxiter: int,
        solution: Tensor,
        state: Tensor,
        residual_sq: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.dense_cg`, unchecked."""
        ...

    def neumann_step(
        self,
        x: Tensor,
        ax: Tensor,
        b: Tensor,
        alpha: Tensor,
        rr: Tensor,
        state: Tensor,
        threshold: Tensor,
        limit: Tensor,
        maxiter: int,
        rr_out: Tensor,
        state_out: Tensor,
        residual_sq: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.neumann_step`, unchecked."""
        ...

    def multi_dot(
        self,
        w: Tensor,
        basis: Tensor,
        count: int,
        state: Tensor,
        products: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.multi_dot`, unchecked."""
        ...

    def arnoldi_project(
        self,
        w: Tensor,
        basis: Tensor,
        count: int,
        first: Tensor,
        state: Tensor,
        w_out: Tensor,
        second: Tensor,
        ww: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.arnoldi_project`, unchecked."""
        ...

    def arnoldi_step(
        self,
        w: Tensor,
        basis: Tensor,
        count: int,
        first: Tensor,
        second: Tensor,
        ww: Tensor,
        left: Tensor,
        column: Tensor,
        norm: Tensor,
        rr: Tensor,
        state: Tensor,
        threshold: Tensor,
        maxiter: int,
        rr_out: Tensor,
        state_out: Tensor,
        residual_sq: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.arnoldi_step`, unchecked."""
        ...

    def anderson_dots(
        self,
        image: Tensor,
        z: Tensor,
        z_before: Tensor,
        residual: Tensor,
        residuals: Tensor,
        moves: Tensor,
        slot: int,
        count: int,
        beta: float,
        state: Tensor,
        row: Tensor,
        products: Tensor,
        squares: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.anderson_dots`, unchecked."""
        ...

    def anderson_mix(
        self,
        z: Tensor,
        residual: Tensor,
        moves: Tensor,
        coefficients: Tensor,
        count: int,
        beta: float,
        state: Tensor,
        z_out: Tensor,
    ) -> None:
        """Do `tritonimplicit_kernels.anderson_mix`, unchecked."""
        ...


def backend(name: str, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """Return the backend called `name` for vectors of `dtype` on `device`.

    "auto" is "triton" on a CUDA or ROCm device where triton is installed, else "reference".

    Raises:
        ValueError: no backend has that name.
        TypeError: `dtype` is neither float32 nor float64.
        ImportError: "triton" is asked for and not installed.
        RuntimeError: "triton" is asked for and cannot run on `device`.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, not {name!r}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"vectors must be float32 or float64, not {dtype}")
    device = torch.device(device)
    if name == "auto":
        on_gpu = device.type == "cuda"  # ROCm builds of torch call their devices cuda as well
        name = "triton" if on_gpu and find_spec("triton") else "reference"
    return reference if name == "reference" else _triton(device)


def partial_count(ld: int, device: torch.device | str) -> int:
    """Return P, the partial sums a row of `ld` elements that the ops on `device` work best with."""
    return backend("auto", device, torch.float32).partial_count(ld)


def _triton(device: torch.device) -> Backend:
    if not find_spec("triton"):
        raise ImportError(
            "backend='triton' needs the package triton, which is not installed: "
            "install it, or use backend='reference'"
        )
    # Imported here because triton is optional, and slow to import.
    from tritonimplicit_kernels import triton as kernels

    if device.type != "cuda" and not (device.type == "cpu" and kernels.INTERPRETED):
        raise RuntimeError(
            f"backend='triton' cannot run on {device}: move the tensors to a CUDA or ROCm device, "
            "use backend='reference', or set TRITON_INTERPRET=1 before the first import of triton "
            "to run the kernels on the CPU in Triton's interpreter (slow, for tests)"
        )
    return kernels
