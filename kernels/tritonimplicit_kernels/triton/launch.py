"""How kernels are launched: grid, block, warps; the one place that says so."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tritonimplicit_kernels.layout import MAX_P

# A block is 8 KiB of a vector: with 8 warps, two 128-bit loads a thread on NVIDIA, one on AMD.
_BLOCK_BYTES: Final = 8192
_WARPS: Final = 8
_CHUNK: Final = 2048


def partial_count(ld: int) -> int:
    """Return P, the number of chunks that a row of `ld` elements is cut into."""
    return min(MAX_P, -(-ld // _CHUNK))


def launch(kernel: Any, vector: Tensor, partials: Tensor, *args: Tensor | int) -> None:
    """Run `kernel(*args, ld // 16, P)` with P programs for each row of `vector` (B, ld).

    `partials` (..., P) says P.
    """
    batch, ld = vector.shape
    count = partials.shape[-1]
    if batch == 0:
        return
    with torch.cuda.device_of(vector):  # Triton launches on the current device
        kernel[(batch * count,)](
            *args,
            ld // 16,
            count,
            MAX_P=MAX_P,
            BLOCK=_BLOCK_BYTES // vector.element_size(),
            num_warps=_WARPS,
            enable_fp_fusion=False,  # round as the reference does
        )
