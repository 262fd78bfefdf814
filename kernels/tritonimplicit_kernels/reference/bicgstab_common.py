"""A single system on a CPU that goes on, as `bicgstab_rules` would decide.

In Python's floats: where vectors are small, the rules' torch calls cost more than their work.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.reference.few import go_on
from tritonimplicit_kernels.reference.tiles import total


def advances_alone(
    shadow_dots: Tensor,
    rho: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    alpha_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
    dtype: torch.dtype,
) -> float | None:
    """Settle the state and return alpha, as `decide_half` does; else None, nothing written.

    That is where there is more than one system, or the one stops, or r^.v is rounding.
    """
    if state.shape[1] != 1:
        return None
    (seen,), (iterations,) = state.tolist()
    (residual,), ((along,), (shadow_sq,), (vv,)) = total(rr).tolist(), total(shadow_dots).tolist()
    (before,), (tolerance,), (largest,) = rho.tolist(), threshold.tolist(), limit.tolist()
    advances = (
        seen == status.RUNNING
        and iterations < maxiter
        and tolerance < residual < math.inf
        and residual <= largest
        and vv < math.inf
        and _outweighs(along, shadow_sq, vv, dtype)
    )
    if not advances:
        return None
    alpha: float = (before or shadow_sq) / along
    alpha_out.fill_(alpha)
    go_on(total(rr), state, state_out, residual_sq)
    return alpha


def goes_on_alone(
    shadow_dots: Tensor,
    ss_in: Tensor,
    half_dots: Tensor,
    alpha_in: Tensor,
    unit_in: Tensor,
    threshold: Tensor,
    state: Tensor,
    rho: Tensor,
    dtype: torch.dtype,
) -> tuple[float, ...] | None:
    """Write the next rho and return the four scalars of `decide_step`; else None, nothing written.

    That is where there is more than one system, or the one is frozen or has to begin afresh.
    """
    if state.shape[1] != 1 or state[0].tolist() != [status.RUNNING]:
        return None
    (along,), (shadow_sq,), _ = total(shadow_dots).tolist()
    (ts,), (tt,), (shadow_s,), (shadow_t,) = total(half_dots).tolist()
    (ss,) = total(ss_in).tolist()
    (alpha,), (unit,), (tolerance,) = alpha_in.tolist(), unit_in.tolist(), threshold.tolist()
    needed = ss * unit * unit > tolerance
    if not (needed and 0 < tt < math.inf and _outweighs(ts, tt, ss, dtype)):
        return None
    omega = _rounded(ts / tt, dtype)
    next_rho = shadow_s - omega * shadow_t
    if alpha == 0 or along * omega == 0 or not _outweighs(next_rho, shadow_sq, ss, dtype):
        return None
    rho.fill_(next_rho)
    return alpha * unit, omega * unit, omega, next_rho / (along * omega)


def _outweighs(dot: float, square: float, other_square: float, dtype: torch.dtype) -> bool:
    eps: float = torch.finfo(dtype).eps
    return abs(dot) > math.sqrt(square) * math.sqrt(other_square) * eps


def _rounded(number: float, dtype: torch.dtype) -> float:
    return number if dtype is torch.float64 else ctypes.c_float(number).value
