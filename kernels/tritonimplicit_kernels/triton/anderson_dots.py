"""First launch of an Anderson step: the last differences, and the dots of all, k + 6 passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonimplicit_kernels.triton.history import launch_rows, load_rows
from tritonimplicit_kernels.triton.programs import chunk_bounds


@triton.jit
def _remember_block(
    image_ptr, z_ptr, z_before_ptr, residual_ptr, difference_ptr, move_ptr, beta, offsets, mask,
    other,
):  # fmt: skip
    """Write one block of the residual and of both differences; return what has dots."""
    image = tl.load(image_ptr + offsets, mask=mask, other=other)
    z = tl.load(z_ptr + offsets, mask=mask, other=other)
    step = z - tl.load(z_before_ptr + offsets, mask=mask, other=other)
    residual = image - z
    difference = residual - tl.load(residual_ptr + offsets, mask=mask, other=other)
    tl.store(residual_ptr + offsets, residual, mask=mask)
    tl.store(difference_ptr + offsets, difference, mask=mask)
    difference64 = difference.to(tl.float64)
    move = step.to(tl.float64) + difference64 * beta
    tl.store(move_ptr + offsets, move.to(z.dtype), mask=mask)
    return image.to(tl.float64), residual.to(tl.float64), difference64


@triton.jit(do_not_specialize=["slot", "count", "beta", "ld16", "P"])
def _anderson_dots_kernel(
    image_ptr,
    z_ptr,
    z_before_ptr,
    residual_ptr,
    residuals_ptr,
    moves_ptr,
    slot,
    count,
    beta: tl.float64,
    state_ptr,
    row_ptr,
    products_ptr,
    squares_ptr,
    ld16,
    P,
    MAX_P: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    b = (pid // P).to(tl.int64)
    rows = tl.arange(0, K)
    have = rows < count
    newest = (rows == slot)[:, None]
    row = tl.zeros([K, BLOCK], tl.float64)
    products = tl.zeros([K, BLOCK], tl.float64)
    residual_sq = tl.zeros([BLOCK], tl.float64)
    image_sq = tl.zeros([BLOCK], tl.float64)
    if tl.load(state_ptr + b) < 0:
        ld = ld16.to(tl.int64) * 16
        start, whole, end = chunk_bounds(pid % P, ld, P, BLOCK)
        image_ptr += b * ld
        z_ptr += b * ld
        z_before_ptr += b * ld
        residual_ptr += b * ld
        residuals_ptr += b * ld
        stride = (programs // P) * ld
        row_offsets = rows * stride
        difference_ptr = residuals_ptr + slot * stride
        move_ptr = moves_ptr + (b * ld + slot * stride)
        others = have & (rows != slot)
        lanes = tl.arange(0, BLOCK)
        for s in range(start, whole, BLOCK):
            image, residual, difference = _remember_block(
                *(image_ptr, z_ptr, z_before_ptr, residual_ptr, difference_ptr, move_ptr, beta),
                *(s + lanes, None, None),
            )
            history = load_rows(residuals_ptr, row_offsets, others, s + lanes, None)
            history = tl.where(newest, difference[None, :], history)
            row += history * difference[None, :]
            products += history * residual[None, :]
            residual_sq += residual * residual
            image_sq += image * image
        if whole < end:
            tail = whole + lanes
            image, residual, difference = _remember_block(
                *(image_ptr, z_ptr, z_before_ptr, residual_ptr, difference_ptr, move_ptr, beta),
                *(tail, tail < end, 0.0),
            )
            history = load_rows(residuals_ptr, row_offsets, others, tail, tail < end)
            history = tl.where(newest, difference[None, :], history)
            row += history * difference[None, :]
            products += history * residual[None, :]
            residual_sq += residual * residual
            image_sq += image * image
    tl.store(row_ptr + rows * programs + pid, tl.sum(row, axis=1), mask=have)
    tl.store(products_ptr + rows * programs + pid, tl.sum(products, axis=1), mask=have)
    tl.store(squares_ptr + pid, tl.sum(residual_sq, axis=0))
    tl.store(squares_ptr + programs + pid, tl.sum(image_sq, axis=0))


def anderson_dots(
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
    """Remember the last differences of each running sample, and write the partial sums of dots."""
    launch_rows(
        _anderson_dots_kernel,
        residuals,
        squares.shape[-1],
        image,
        z,
        z_before,
        residual,
        residuals,
        moves,
        slot,
        count,
        beta,
        state,
        row,
        products,
        squares,
    )
