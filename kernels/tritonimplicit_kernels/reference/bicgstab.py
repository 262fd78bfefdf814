"""BiCGSTAB with merged dots (van der Vorst 1992, doi 10.1137/0913035)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit_kernels.reference import few, plain
from tritonimplicit_kernels.reference.bicgstab_common import advances_alone, goes_on_alone
from tritonimplicit_kernels.reference.bicgstab_rules import decide_half, decide_step
from tritonimplicit_kernels.reference.dots import products, row_sums, scratch, squares, widen
from tritonimplicit_kernels.reference.tiles import (
    column_tiles,
    put_back,
    row_groups,
    take,
    write_sums,
)


def bicgstab_dots(shadow: Tensor, v: Tensor, state: Tensor, shadow_dots: Tensor) -> None:
    """Write r^.v, r^.r^ and v.v of each running system, and zero for a frozen one."""
    if shadow.device.type != "cpu":
        return plain.bicgstab_dots(shadow, v, state, shadow_dots)
    shadow_dots.zero_()
    for rows in row_groups(shadow, few.running(state)):
        tiles = column_tiles(*take(rows, shadow, v))
        write_sums(shadow_dots, rows, row_sums(_shadow_products(*tile) for tile in tiles))
    return None


def _shadow_products(shadow: Tensor, v: Tensor) -> Tensor:
    room = scratch(shadow)
    shadow, v = widen(shadow, room.first), widen(v, room.second)
    return torch.stack([products(shadow, v, room.third), squares(shadow), squares(v)])


def bicgstab_half_step(
    r: Tensor,
    v: Tensor,
    shadow_dots: Tensor,
    rho: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    alpha: Tensor,
    ss: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Turn r into s for each system that goes on, or stop it."""
    if r.device.type != "cpu":
        return plain.bicgstab_half_step(
            *(r, v, shadow_dots, rho, rr, state, threshold, limit),
            *(maxiter, alpha, ss, state_out, residual_sq),
        )
    scalars = shadow_dots, rho, rr, state, threshold, limit, maxiter, alpha, state_out, residual_sq
    ss.zero_()
    advances: Tensor | None = None
    scale: Tensor | float | None = advances_alone(*scalars, r.dtype)
    if scale is None:
        advances, scale = decide_half(*scalars, r.dtype)
    v = v.to(r.dtype)
    for rows in row_groups(r, advances):
        vectors = take(rows, r, v)
        here = scale[rows] if isinstance(scale, Tensor) else scale
        sums = row_sums(_half_update(tile, here) for tile in column_tiles(*vectors))
        write_sums(ss, rows, sums)
        put_back(rows, (r,), vectors[:1])
    return None


def _half_update(tile: tuple[Tensor, ...], alpha: Tensor | float) -> Tensor:
    r, v = tile
    room = scratch(r)
    r -= torch.mul(v, alpha, out=room.vectors)  # apart from the sum, as in cg.py
    return squares(widen(r, room.first))


def bicgstab_half_dots(
    shadow: Tensor, s: Tensor, t: Tensor, state: Tensor, half_dots: Tensor
) -> None:
    """Write t.s, t.t, r^.s and r^.t of each running system, and zero for a frozen one."""
    if s.device.type != "cpu":
        return plain.bicgstab_half_dots(shadow, s, t, state, half_dots)
    half_dots.zero_()
    for rows in row_groups(s, few.running(state)):
        tiles = column_tiles(*take(rows, shadow, s, t))
        write_sums(half_dots, rows, row_sums(_half_products(*tile) for tile in tiles))
    return None


def _half_products(shadow: Tensor, s: Tensor, t: Tensor) -> Tensor:
    room = scratch(s)
    s, t = widen(s, room.first), widen(t, room.second)
    ts, tt = products(t, s, room.third), squares(t)
    shadow = widen(shadow, room.third)
    shadow_t = products(t, shadow, room.second)  # in the place of t, and then of s
    return torch.stack([ts, tt, products(s, shadow, room.first), shadow_t])


def bicgstab_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    shadow: Tensor,
    v: Tensor,
    t: Tensor,
    shadow_dots: Tensor,
    ss: Tensor,
    half_dots: Tensor,
    alpha: Tensor,
    unit: Tensor,
    threshold: Tensor,
    state: Tensor,
    rho: Tensor,
    rr_out: Tensor,
) -> None:
    """Finish the iteration of each running system."""
    scalars = shadow_dots, ss, half_dots, alpha, unit, threshold, state, rho, rr_out
    pbicgstab_step(x, r, p, shadow, p, r, v, t, *scalars)


def pbicgstab_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    shadow: Tensor,
    y: Tensor,
    z: Tensor,
    v: Tensor,
    t: Tensor,
    shadow_dots: Tensor,
    ss: Tensor,
    half_dots: Tensor,
    alpha: Tensor,
    unit: Tensor,
    threshold: Tensor,
    state: Tensor,
    rho: Tensor,
    rr_out: Tensor,
) -> None:
    """Finish the iteration of each running system, with y = M p and z = M s."""
    scalars = shadow_dots, ss, half_dots, alpha, unit, threshold, state, rho
    if x.device.type != "cpu":
        return plain.pbicgstab_step(x, r, p, shadow, y, z, v, t, *scalars, rr_out)
    rr_out.zero_()
    runs: Tensor | None = None
    fresh: Tensor | None = None
    scales: tuple[Tensor | float, ...] | None = goes_on_alone(*scalars, x.dtype)
    if scales is None:
        runs, fresh, scales = decide_step(*scalars, x.dtype)
        if not any(fresh.tolist()):
            fresh = None
    v, t = v.to(x.dtype), t.to(x.dtype)
    for rows in row_groups(x, runs):
        changes = (x, r, p) if fresh is None else (x, r, p, shadow)
        vectors = take(rows, y, z, v, t, *changes)
        here = tuple(scale[rows] if isinstance(scale, Tensor) else scale for scale in scales)
        begins = None if fresh is None else fresh[rows]
        sums = row_sums(_update(tile, here, begins) for tile in column_tiles(*vectors))
        write_sums(rr_out, rows, sums * unit[rows] * unit[rows])
        put_back(rows, changes, vectors[4:])
    return None


def _update(
    tile: tuple[Tensor, ...], scales: tuple[Tensor | float, ...], fresh: Tensor | None
) -> Tensor:
    y, z, v, t, x, r, p, *shadows = tile
    y_scale, z_scale, omega, beta = scales
    room = scratch(x)
    scaled = room.vectors
    x += torch.mul(y, y_scale, out=scaled)
    x += torch.mul(z, z_scale, out=scaled)
    r -= torch.mul(t, omega, out=scaled)
    p -= torch.mul(v, omega, out=scaled)
    p.mul_(beta).add_(r)
    if fresh is not None:
        for vector in (p, *shadows):
            torch.where(fresh[:, None], r, vector, out=vector)
    return squares(widen(r, room.first))
