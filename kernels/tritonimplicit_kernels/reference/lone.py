"""The common case of a single system on a CPU: it advances, and Python's floats say so.

Where the system is small the three dozen torch calls of `rules` cost more than the vectors' work.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels import status

_ONE_ITERATION: Final = torch.tensor([[0], [1]], dtype=torch.int32, device="cpu")


def advance_cg(
    dots: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    state_out: Tensor,
    residual_sq: Tensor,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return alpha and beta (2,) in `dtype` as `rules.decide_cg` would, and settle the state.

    None, and nothing written, unless the system runs on by every rule.
    """
    folded = rr.sum(-1)
    (rr_b,), ((pap,), (apap,)) = folded.tolist(), dots.sum(-1).tolist()
    (seen,), (iterations,) = state.tolist()
    code = status.RUNNING_POSITIVE if pap > 0 else status.RUNNING_NEGATIVE
    advances = (
        seen in (code, status.RUNNING)
        and iterations < maxiter
        and threshold.item() < rr_b < math.inf
        and apap < math.inf
        and math.sqrt(rr_b) * math.sqrt(apap) * torch.finfo(dtype).eps < abs(pap) < math.inf
    )
    if not advances:
        return None
    residual_sq.copy_(folded)
    torch.add(state, _ONE_ITERATION, out=state_out)
    if seen != code:
        state_out[0] = code
    alpha = rr_b / pap
    beta = max(alpha * alpha * apap - rr_b, 0.0) / rr_b
    return torch.tensor([alpha, beta], dtype=dtype)
