"""Anderson acceleration in the form of Walker and Ni (2011, doi 10.1137/10078356X)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels.reference.dots import many, row_dots, row_squares, squares
from tritonimplicit_kernels.reference.history import less_combination
from tritonimplicit_kernels.reference.tiles import TILE, Rows, row_groups, write_sums


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
    """Remember the last differences of each running sample, and write the dots of all."""
    runs = state[0] < 0
    if z.device.type != "cpu":
        _remember_plainly(*(image, z, z_before, residual, residuals[slot], moves[slot], beta, runs))
        history = residuals[:count].unbind()
        sums = [[row_dots(u, v) for u in history] for v in (residuals[slot], residual)]
        for out, values in zip((row, products), sums, strict=True):
            out[:count] = 0
            out[:count, :, 0] = torch.where(runs, torch.stack(values), 0.0)
        squares.zero_()
        both = torch.stack([row_squares(residual), row_squares(image)])
        squares[..., 0] = torch.where(runs, both, 0.0)
        return
    for out in (row[:count], products[:count], squares):
        out.zero_()
    for rows in row_groups(z, runs, weight=count + 3):
        sums_of_rows = torch.stack(
            [
                _remember_tile(
                    *(image, z, z_before, residual, residuals, moves),
                    *(slot, count, beta, rows, columns),
                )
                for columns in _spans(z.shape[1], TILE // (count + 3))
            ]
        ).sum(0)  # (2 k + 2, R)
        write_sums(row[:count], rows, sums_of_rows[:count])
        write_sums(products[:count], rows, sums_of_rows[count : 2 * count])
        write_sums(squares, rows, sums_of_rows[2 * count :])


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
    runs: Tensor,
) -> None:
    now = image - z
    change = now - residual
    step = (z - z_before) + beta * change
    for v, value in ((residual, now), (difference, change), (move, step)):
        torch.where(runs[:, None], value, v, out=v)


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
    image, z, z_before = (v[rows, columns] for v in (image, z, z_before))
    # One vector is taken twice: of a single column torch adds up one row otherwise than many.
    room = many(image, max(2, count) + 3)  # (k + 3, R, W)
    now = room[-1].view(z.dtype)[:, : z.shape[1]]
    torch.sub(image, z, out=now)
    change = now - residual[rows, columns]
    residual[rows, columns] = now
    residuals[slot, rows, columns] = change
    move = torch.sub(z, z_before)
    move += torch.mul(change, beta, out=now)  # apart, for the reason given in cg.py
    moves[slot, rows, columns] = move
    history, pair, wide = room[:-3], room[-3:-1], room[-1]
    history.copy_(residuals[:count, rows, columns])
    pair[0].copy_(change)
    pair[1].copy_(residual[rows, columns])
    wide.copy_(image)
    both = torch.bmm(pair.transpose(0, 1), history.permute(1, 2, 0))[..., :count]  # (R, 2, k)
    own = torch.stack([squares(pair[1]), squares(wide)])
    return torch.cat([both.flatten(1).T, own])
