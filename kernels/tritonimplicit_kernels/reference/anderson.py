"""Anderson acceleration in the form of Walker and Ni (2011, doi 10.1137/10078356X)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels.reference import few
from tritonimplicit_kernels.reference.dots import (
    WIDENED,
    many,
    row_dots,
    row_squares,
    row_sums,
    squares,
)
from tritonimplicit_kernels.reference.history import less_combination
from tritonimplicit_kernels.reference.tiles import (
    TILE,
    Rows,
    put_back,
    row_groups,
    take,
    write_sums,
)


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
    """Remember the last differences, and write the dots: of a frozen sample anything, and zero."""
    if z.device.type != "cpu":
        _remember_plainly(image, z, z_before, residual, residuals[slot], moves[slot], beta)
        history = residuals[:count].unbind()
        sums = [[row_dots(u, v) for u in history] for v in (residuals[slot], residual)]
        runs = state[0] < 0
        for out, values in zip((row, products), sums, strict=True):
            out[:count] = 0
            out[:count, :, 0] = torch.where(runs, torch.stack(values), 0.0)
        squares.zero_()
        both = torch.stack([row_squares(residual), row_squares(image)])
        squares[..., 0] = torch.where(runs, both, 0.0)
        return
    for out in (row[:count], products[:count], squares):
        out.zero_()
    vectors = image, z, z_before, residual, residuals, moves
    widened = -(-(max(2, count) + 3) // WIDENED)
    wanted = few.running(state)
    running = sum(wanted)
    # To pick scattered rows, and to put them back, costs as much again as what is done with them.
    for rows in row_groups(z, wanted if 2 * running < len(wanted) else None, widened):
        spans = _spans(z.shape[1], TILE // widened)
        dots = row_sums(_remember_tile(*vectors, slot, count, beta, rows, span) for span in spans)
        write_sums(row[:count], rows, dots[:count])
        write_sums(products[:count], rows, dots[count : 2 * count])
        write_sums(squares, rows, dots[2 * count :])
    if running < len(wanted):
        for out in (row[:count], products[:count], squares):
            out.masked_fill_((state[0] >= 0)[:, None], 0.0)


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
    runs = state[0] < 0
    less_combination(residual, beta, coefficients[:, :count], moves[:count], z_out).add_(z)
    if z.device.type != "cpu" or not all(runs.tolist()):
        torch.where(runs[:, None], z_out, z, out=z_out)


def _spans(ld: int, width: int) -> list[slice]:
    """Cut a row into tiles that do not depend on the batch."""
    width = max(16, width // 16 * 16)
    return [slice(start, min(start + width, ld)) for start in range(0, ld, width)]


def _remember_plainly(
    image: Tensor,
    z: Tensor,
    z_before: Tensor,
    residual: Tensor,
    difference: Tensor,
    move: Tensor,
    beta: float,
) -> None:
    now = image - z
    torch.sub(now, residual, out=difference)
    residual.copy_(now)
    torch.add(z - z_before, beta * difference, out=move)


def _remember_tile(
    image: Tensor,
    z: Tensor,
    z_before: Tensor,
    residual: Tensor,
    residuals: Tensor,
    moves: Tensor,
    slot: int,
    count: int,
    beta: float,
    rows: Rows,
    columns: slice,
) -> Tensor:
    """Do a tile of some rows; return its part of the sums, (2 k + 2, R)."""
    changes = [v[:, columns] for v in (residual, residuals[slot], moves[slot])]
    image, z, z_before, last, difference, move = take(
        rows, *(v[:, columns] for v in (image, z, z_before)), *changes
    )
    # One vector is taken twice: of a single column torch adds up one row otherwise than many.
    room = many(image, max(2, count) + 3)  # (k + 3, R, W)
    now = room[-1].view(z.dtype)[:, : z.shape[1]]
    torch.sub(image, z, out=now)
    torch.sub(now, last, out=difference)
    last.copy_(now)
    torch.sub(z, z_before, out=move)
    move += difference if beta == 1 else torch.mul(difference, beta, out=now)
    put_back(rows, changes, (last, difference, move))
    history, pair, own = room[:-3], room[-3:-1], room[-2:]
    history.copy_(residuals[:count, rows, columns])
    for wide, v in zip(room[-3:].unbind(), (difference, last, image), strict=True):
        wide.copy_(v)
    both = torch.bmm(pair.transpose(0, 1), history.permute(1, 2, 0))[..., :count]  # (R, 2, k)
    return torch.cat([both.flatten(1).T, squares(own.flatten(0, 1)).view(2, -1)])
