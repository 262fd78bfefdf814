"""What a step decides for a few systems on a CPU, in Python's floats, as `rules` does.

The four dozen torch calls of `rules` cost more than the vectors' work where systems are small, and
from the first that stops on a solve has some that are frozen beside others that run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.reference.rules import cg_scales
from tritonimplicit_kernels.reference.tiles import total

MOST: Final = 128
"""Systems for which lists of floats take as long as torch's calls."""
_ONE_ITERATION: Final = torch.tensor([[0], [1]], dtype=torch.int32, device="cpu")


def are_few(state: Tensor) -> bool:
    """Whether `state` (2, B) is of systems for which this is the way."""
    return state.device.type == "cpu" and 0 < state.shape[1] <= MOST


def running(state: Tensor) -> list[bool]:
    """Which systems run, read by the host."""
    if are_few(state):
        return [code < 0 for code in state.tolist()[0]]
    runs: list[bool] = (state[0] < 0).tolist()
    return runs


def go_on(rr: Tensor, state: Tensor, state_out: Tensor, residual_sq: Tensor) -> None:
    """Settle the state of systems that all advance; `rr` is (B,)."""
    residual_sq.copy_(rr)
    torch.add(state, _ONE_ITERATION, out=state_out)


def decide_cg(
    dots: Tensor,
    rr: Tensor,
    rz: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
    dtype: torch.dtype,
) -> tuple[list[bool], Tensor | float, Tensor | float]:
    """Settle the state; return which systems advance, and alpha and beta.

    These are floats of a single system, and else (B, 1) in `dtype`.
    """
    rr_b, (pap, apmap) = total(rr), total(dots)  # (B,) each
    rz_b = rr_b if rz is rr else total(rz)
    (seen, iterations), eps = state.tolist(), torch.finfo(dtype).eps
    residuals, tolerances = rr_b.tolist(), threshold.tolist()
    energies, curvatures, squares = rz_b.tolist(), pap.tolist(), apmap.tolist()
    systems = zip(
        *(seen, iterations, residuals, tolerances, energies, curvatures, squares), strict=True
    )
    codes = [_cg_code(maxiter, eps, *system) for system in systems]
    advances = _settle(codes, seen, iterations, rr_b, state, state_out, residual_sq)
    if len(codes) > 1:
        return advances, *cg_scales(rz_b, pap, apmap, dtype)
    if not advances[0]:
        return advances, 0.0, 0.0
    return advances, *_cg_scales(energies[0], curvatures[0], squares[0])


def decide_neumann(
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
) -> list[bool]:
    """Settle the state; return which systems advance."""
    rr_b = total(rr)  # (B,)
    seen, iterations = state.tolist()
    residuals, tolerances, limits = rr_b.tolist(), threshold.tolist(), limit.tolist()
    systems = zip(seen, iterations, residuals, tolerances, limits, strict=True)
    codes = [_neumann_code(maxiter, *system) for system in systems]
    return _settle(codes, seen, iterations, rr_b, state, state_out, residual_sq)


def decide_arnoldi(
    size_sq: Tensor,
    singular: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
) -> list[bool]:
    """Settle the state; return which systems advance."""
    seen, iterations = state.tolist()
    residuals, tolerances = rr.tolist(), threshold.tolist()
    systems = zip(
        *(seen, iterations, residuals, tolerances, size_sq.tolist(), singular.tolist()), strict=True
    )
    codes = [_arnoldi_code(maxiter, *system) for system in systems]
    return _settle(codes, seen, iterations, rr, state, state_out, residual_sq)


def _cg_code(
    maxiter: int,
    eps: float,
    seen: int,
    iterations: int,
    rr: float,
    threshold: float,
    rz: float,
    pap: float,
    apmap: float,
) -> int:
    """Say what a system turns to; the first rule that holds wins."""
    if seen >= 0:
        return seen
    if not rr < math.inf:
        return status.NON_FINITE
    if rr <= threshold:
        return status.CONVERGED
    if iterations >= maxiter:
        return status.MAX_ITERATIONS
    if not (abs(pap) < math.inf and abs(apmap) < math.inf and abs(rz) < math.inf):
        return status.NON_FINITE
    if rz <= 0 or apmap < 0:
        return status.PRECONDITIONER
    if abs(pap) <= math.sqrt(rz) * math.sqrt(apmap) * eps:
        return status.BREAKDOWN
    code = status.RUNNING_POSITIVE if pap > 0 else status.RUNNING_NEGATIVE
    return code if seen in (status.RUNNING, code) else status.INDEFINITE


def _cg_scales(rz: float, pap: float, apmap: float) -> tuple[float, float]:
    """Return alpha and beta."""
    alpha = rz / pap
    return alpha, max(alpha * alpha * apmap - rz, 0.0) / rz


def _neumann_code(
    maxiter: int, seen: int, iterations: int, rr: float, threshold: float, limit: float
) -> int:
    """Say what a system turns to; the first rule that holds wins."""
    if seen >= 0:
        return seen
    if not rr < math.inf:
        return status.NON_FINITE
    if rr <= threshold:
        return status.CONVERGED
    if rr > limit:
        return status.DIVERGED
    return status.MAX_ITERATIONS if iterations >= maxiter else status.RUNNING


def _arnoldi_code(
    maxiter: int,
    seen: int,
    iterations: int,
    rr: float,
    threshold: float,
    size_sq: float,
    singular: bool,
) -> int:
    """Say what a system turns to; the first rule that holds wins."""
    if seen >= 0:
        return seen
    if not rr < math.inf:
        return status.NON_FINITE
    if rr <= threshold:
        return status.CONVERGED
    if iterations >= maxiter:
        return status.MAX_ITERATIONS
    if not size_sq < math.inf:
        return status.NON_FINITE
    return status.BREAKDOWN if singular else status.RUNNING


def _settle(
    codes: list[int],
    seen: list[int],
    iterations: Sequence[int],
    rr: Tensor,
    state: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> list[bool]:
    """Write what the systems have come to, frozen ones kept; return which advance."""
    advances = [code < 0 for code in codes]
    if codes == seen and all(advances):
        go_on(rr, state, state_out, residual_sq)
        return advances
    done = [count + more for count, more in zip(iterations, advances, strict=True)]
    state_out.copy_(torch.tensor([codes, done], dtype=torch.int32, device="cpu"))
    torch.where(state[0] < 0, rr, residual_sq, out=residual_sq)
    return advances
