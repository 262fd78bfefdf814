"""Decide which systems go on: status codes in, status codes out."""

from __future__ import annotations

import torch
from torch import Tensor


def settle(
    code: Tensor, rr: Tensor, state: Tensor, state_out: Tensor, residual_sq: Tensor
) -> list[bool]:
    """Write what the systems have come to, and return which of them advance.

    `code` (B,) is what the running systems turn to, `rr` (B,) their squared residual norm;
    frozen systems (`state[0]` >= 0) keep what they have.
    """
    runs = state[0] < 0
    torch.where(runs, rr, residual_sq, out=residual_sq)
    torch.where(runs, code, state[0], out=state_out[0])
    advances = state_out[0] < 0
    torch.add(state[1], advances, out=state_out[1])
    return advances.tolist()  # type: ignore[no-any-return]
