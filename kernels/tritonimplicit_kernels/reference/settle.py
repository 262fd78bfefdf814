"""What a step's decisions mean for the state of the systems."""

from __future__ import annotations

import torch
from torch import Tensor


def settle(
    code: Tensor, rr: Tensor, state: Tensor, state_out: Tensor, residual_sq: Tensor
) -> list[bool]:
    """Write what the systems have come to, and return which of them advance.

    `code` (B,) says what a running system turns to, `rr` (B,) is the squared norm of its residual.
    Frozen systems (`state[0]` >= 0) keep what they have.
    """
    seen, iterations = state
    runs = seen < 0
    torch.where(runs, rr, residual_sq, out=residual_sq)
    torch.where(runs, code, seen, out=state_out[0])
    advances = state_out[0] < 0
    torch.add(iterations, advances, out=state_out[1])
    return advances.tolist()
