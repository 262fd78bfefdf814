"""The ops, registered once with torch.library: checked, and picked by device.

On CUDA and ROCm devices they run as Triton kernels, elsewhere as plain torch. `layout` says what
the tensors look like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels.backends import backend
from tritonimplicit_kernels.layout import check_layout, check_memory

_LIBRARY: Final = torch.library.Library("tritonimplicit", "DEF")
SCHEMAS: Final = {
    "cg_dots": "Tensor p, Tensor ap, Tensor state, Tensor(a!) dots",
    "cg_step": "Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor ap, Tensor dots, Tensor rr, "
    "Tensor state, Tensor threshold, int maxiter, Tensor(d!) rr_out, Tensor(e!) state_out, "
    "Tensor(f!) residual_sq",
    "pcg_dots": "Tensor p, Tensor ap, Tensor d, Tensor state, Tensor(a!) dots",
    "pcg_step": "Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor ap, Tensor d, Tensor dots, "
    "Tensor rr, Tensor rz, Tensor state, Tensor threshold, int maxiter, Tensor(d!) rr_out, "
    "Tensor(e!) rz_out, Tensor(f!) state_out, Tensor(g!) residual_sq",
    "neumann_step": "Tensor(a!) x, Tensor ax, Tensor b, Tensor alpha, Tensor rr, Tensor state, "
    "Tensor threshold, Tensor limit, int maxiter, Tensor(b!) rr_out, Tensor(c!) state_out, "
    "Tensor(d!) residual_sq",
}


def _register(name: str, arguments: str) -> None:
    _LIBRARY.define(f"{name}({arguments}) -> ()")
    names = [argument.split()[1] for argument in arguments.split(", ")]

    def tensors(values: tuple[Tensor | int, ...]) -> dict[str, Tensor]:
        pairs = zip(names, values, strict=True)
        return {key: value for key, value in pairs if isinstance(value, Tensor)}

    def check(*values: Tensor | int) -> None:
        check_layout(**tensors(values))

    def run(*values: Tensor | int) -> None:
        named = tensors(values)
        check_layout(**named)
        check_memory(**named)
        vector = named[names[0]]
        op: Callable[..., None] = getattr(backend("auto", vector.device, vector.dtype), name)
        op(*values)

    _LIBRARY.impl(name, check, "Meta")
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)


for _name, _arguments in SCHEMAS.items():
    _register(_name, _arguments)


def cg_dots(p: Tensor, ap: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write the partial sums of p.Ap into `dots[0]` and of Ap.Ap into `dots[1]`: 2 passes.

    p, ap: (B, ld); state: (2, B) int32; dots: (2, B, P) float64, zero for a frozen system.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.cg_dots(p, ap, state, dots)


def cg_step(
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
    """Do the rest of a CG iteration after `cg_dots`, or stop a system: 7 passes.

    Predict-and-recompute conjugate gradients (Chen and Carson 2020, doi 10.1137/19M1276856):
    alpha = r.r / p.Ap and beta = max(alpha^2 Ap.Ap - r.r, 0) / r.r in float64, rounded once to
    the vectors' dtype; x += alpha p; r -= alpha Ap; p = r + beta p.

    x, r, p, ap: (B, ld); dots: (2, B, P); rr, rr_out: (B, P) partial sums of r.r before and
    after; state, state_out: (2, B) int32; threshold: (B,), the squared residual norm at which a
    system has converged; residual_sq: (B,), r.r before the step. A system that stops, or has
    stopped, keeps x, r, p; its `rr_out` is zero.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.cg_step(
        x, r, p, ap, dots, rr, state, threshold, maxiter, rr_out, state_out, residual_sq
    )


def pcg_dots(p: Tensor, ap: Tensor, d: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write the partial sums of p.Ap into `dots[0]` and of Ap.(d Ap) into `dots[1]`: 3 passes.

    p, ap, d: (B, ld); state: (2, B) int32; dots: (2, B, P) float64, zero for a frozen system.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.pcg_dots(p, ap, d, state, dots)


def pcg_step(
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
    """Do the rest of a CG iteration with the preconditioner M = diag(d): 8 passes.

    Predict-and-recompute preconditioned conjugate gradients (Chen and Carson 2020, doi
    10.1137/19M1276856). As z.Ap = p.Ap for z = d r, the next r.z is alpha^2 Ap.(d Ap) - r.z:
    alpha = r.z / p.Ap and beta = max(alpha^2 Ap.(d Ap) - r.z, 0) / r.z in float64, rounded once
    to the vectors' dtype; x += alpha p; r -= alpha Ap; p = d r + beta p.

    x, r, p, ap: (B, ld); d: (B, ld), positive (PRECONDITIONER where r.z or Ap.(d Ap) shows that
    it is not); dots: (2, B, P); rr, rr_out and rz, rz_out: (B, P) partial sums of r.r and of r.z
    before and after; state, state_out: (2, B) int32; threshold: (B,), the squared norm of r at
    which a system has converged; residual_sq: (B,), r.r before the step. A system that stops, or
    has stopped, keeps x, r, p; its `rr_out` and `rz_out` are zero.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.pcg_step(
        *(x, r, p, ap, d, dots, rr, rz, state, threshold),
        *(maxiter, rr_out, rz_out, state_out, residual_sq),
    )


def neumann_step(
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
    """Do one Richardson iteration x += alpha (b - A x), or stop a system: 4 passes.

    After k iterations from x = 0 that is the Neumann series of A^-1 b, cut after k terms.

    x, ax, b: (B, ld); alpha: (B,) float64; rr, rr_out: (B, P) partial sums of the squared
    residual of the previous iterate, and of this one; state, state_out: (2, B) int32; threshold,
    limit: (B,), the squared residual norms at which a system has converged and above which it
    has diverged; residual_sq: (B,), the sum of `rr`. A system that stops, or has stopped, keeps
    x; its `rr_out` is zero.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.neumann_step(
        x, ax, b, alpha, rr, state, threshold, limit, maxiter, rr_out, state_out, residual_sq
    )
