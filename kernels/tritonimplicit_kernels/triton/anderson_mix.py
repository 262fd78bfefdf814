"""Second launch of an Anderson step: the next iterate, k + 3 passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.history import launch_rows, load_rows
from tritonimplicit_kernels.triton.launch import partial_count
from tritonimplicit_kernels.triton.programs import chunk_bounds


@triton.jit
def _mix_block(
    z_ptr, residual_ptr, moves_ptr, z_out_ptr, c, beta, row_offsets, have, runs, offsets, mask,
    other,
):  # fmt: skip
    """Mix one block, in float64, rounded once; a frozen sample's is copied."""
    z = tl.load(z_ptr + offsets, mask=mask, other=other)
    residual = tl.load(residual_ptr + offsets, mask=mask, other=other).to(tl.float64)
    moves = load_rows(moves_ptr, row_offsets, have, offsets, mask)
    step = beta * residual - tl.sum(moves * c[:, None], axis=0)
    mixed = (z.to(tl.float64) + step).to(z.dtype)
    tl.store(z_out_ptr + offsets, tl.where(runs, mixed, z), mask=mask)


@triton.jit(do_not_specialize=["count", "capacity", "beta", "ld16", "P"])
def _anderson_mix_kernel(
    z_ptr,
    residual_ptr,
    moves_ptr,
    coefficients_ptr,
    count,
    beta: tl.float64,
    state_ptr,
    z_out_ptr,
    capacity,
    ld16,
    P,
    MAX_P: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)
    rows = tl.arange(0, K)
    runs = tl.load(state_ptr + b) < 0
    have = rows < tl.where(runs, count, 0)  # of a frozen sample no history is read
    c = tl.load(coefficients_ptr + b * capacity + rows, mask=have, other=0.0)
    ld = ld16.to(tl.int64) * 16
    start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
    z_ptr += b * ld
    residual_ptr += b * ld
    moves_ptr += b * ld
    z_out_ptr += b * ld
    row_offsets = rows * ((tl.num_programs(0) // P) * ld)
    lanes = tl.arange(0, BLOCK)
    for s in range(start, whole, BLOCK):
        _mix_block(
            *(z_ptr, residual_ptr, moves_ptr, z_out_ptr, c, beta, row_offsets, have, runs),
            *(s + lanes, None, None),
        )
    if whole < end:
        tail = whole + lanes
        _mix_block(
            *(z_ptr, residual_ptr, moves_ptr, z_out_ptr, c, beta, row_offsets, have, runs),
            *(tail, tail < end, 0.0),
        )


def anderson_mix(
    z: Tensor,
    residual: Tensor,
    moves: Tensor,
    coefficients: Tensor,
    count: int,
    beta: float,
    state: Tensor,
    z_out: Tensor,
) -> None:
    """Write the next iterate of each running sample, and the same one of a frozen sample."""
    launch_rows(
        _anderson_mix_kernel,
        moves,
        partial_count(z.shape[1]),
        z,
        residual,
        moves,
        coefficients,
        count,
        beta,
        state,
        z_out,
        moves.shape[0],
    )
