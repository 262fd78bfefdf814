"""A BiCGSTAB iteration's arguments, and an oracle for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.problems import EPS64, F64, Close, Step, Target, partials, randn
from tritonimplicit_kernels import Backend, row_dots, row_norms, status


@dataclass
class BiCGSTAB(Step):
    """What the four launches take; between them stands t = diag(diagonal) s."""

    r: Tensor
    p: Tensor
    shadow: Tensor
    v: Tensor
    t: Tensor
    diagonal: Tensor
    shadow_dots: Tensor
    ss: Tensor
    half_dots: Tensor
    alpha: Tensor
    unit: Tensor
    rho: Tensor
    limit: Tensor

    @property
    def s(self) -> Tensor:
        return self.r

    def launch(self, backend: Backend) -> None:
        self.launch_dots(backend)
        self.launch_half_step(backend)
        self.multiply()
        self.launch_half_dots(backend)
        self.launch_step(backend)

    def launch_dots(self, backend: Backend) -> None:
        backend.bicgstab_dots(self.shadow, self.v, self.state, self.shadow_dots)

    def launch_half_step(self, backend: Backend) -> None:
        backend.bicgstab_half_step(
            *(self.r, self.v, self.shadow_dots, self.rho, self.rr, self.state, self.threshold),
            *(self.limit, self.maxiter, self.alpha, self.ss, self.state_out, self.residual_sq),
        )

    def multiply(self) -> None:
        torch.mul(self.diagonal, self.s, out=self.t)

    def launch_half_dots(self, backend: Backend) -> None:
        backend.bicgstab_half_dots(self.shadow, self.s, self.t, self.state_out, self.half_dots)

    def launch_step(self, backend: Backend) -> None:
        backend.bicgstab_step(self.x, self.r, self.p, self.shadow, self.v, self.t, *self.scalars)

    @property
    def scalars(self) -> tuple[Tensor, ...]:
        return (
            *(self.shadow_dots, self.ss, self.half_dots, self.alpha, self.unit),
            *(self.threshold, self.state_out, self.rho, self.rr_out),
        )


@dataclass
class PBiCGSTAB(BiCGSTAB):
    """The same with M = diag(inverse)."""

    y: Tensor
    z: Tensor
    inverse: Tensor

    def multiply(self) -> None:
        torch.mul(self.inverse, self.s, out=self.z)
        torch.mul(self.diagonal, self.z, out=self.t)

    def launch_step(self, backend: Backend) -> None:
        backend.pbicgstab_step(
            *(self.x, self.r, self.p, self.shadow, self.y, self.z, self.v, self.t), *self.scalars
        )


VECTORS = ("x", "r", "p", "shadow", "v", "y")
SUMS = ("shadow_dots", "ss", "half_dots", "rr_out")
RESULTS = ("x", "r", "p", "shadow", *SUMS, "alpha", "rho", "state_out", "residual_sq")


def bicgstab(batch: int, n: int, dtype: torch.dtype, count: int = 1) -> BiCGSTAB:
    """Return an iteration amid a solve with a diagonal matrix between 1 and 2, outputs poisoned."""
    x, r, p, shadow = (randn(batch, n, dtype, seed) for seed in range(4))
    p, shadow = r + p / 2, r + shadow / 2
    diagonal = torch.linspace(1, 2, x.shape[1], dtype=dtype).repeat(batch, 1)
    unit = torch.linspace(0.5, 3, batch, dtype=F64)
    rr = partials(row_norms(r).square() * unit.square(), count)
    state = torch.full((2, batch), status.RUNNING, dtype=torch.int32)
    state[1] = torch.arange(batch)

    def poison(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=F64)

    return BiCGSTAB(
        x=x,
        rr=rr,
        state=state,
        threshold=torch.zeros(batch, dtype=F64),
        maxiter=1000,
        rr_out=poison(batch, count),
        state_out=torch.full_like(state, 99),
        residual_sq=poison(batch),
        r=r,
        p=p,
        shadow=shadow,
        v=p * diagonal,
        t=torch.full_like(x, torch.nan),
        diagonal=diagonal,
        shadow_dots=poison(3, batch, count),
        ss=poison(batch, count),
        half_dots=poison(4, batch, count),
        alpha=poison(batch),
        unit=unit,
        # Not r^.r: or s, of a single element, would be zero.
        rho=0.7 * row_dots(shadow, r),
        limit=torch.full((batch,), torch.inf, dtype=F64),
    )


def pbicgstab(batch: int, n: int, dtype: torch.dtype, count: int = 1) -> PBiCGSTAB:
    """Return an iteration amid the same solve with a diagonal preconditioner."""
    step = bicgstab(batch, n, dtype, count)
    inverse = torch.linspace(1, 0.6, step.x.shape[1], dtype=dtype).repeat(batch, 1)
    y = inverse * step.p
    step.v = step.diagonal * y
    return PBiCGSTAB(**vars(step), y=y, z=torch.full_like(y, torch.nan), inverse=inverse)


def oracle(step: BiCGSTAB, given_t: Tensor | None = None) -> dict[str, Close]:
    """Do van der Vorst's iteration in float64, with first-order bounds on rounding.

    `given_t` is the t that was read, where it is not diag(diagonal) s but for rounding.
    """
    dtype, n = step.x.dtype, step.x.shape[1]
    # As in `problems`: rounding to the vectors' dtype, and four sums of n terms in float64.
    u = torch.finfo(dtype).eps + 4 * (n**0.5 + 1) * EPS64
    x, r, p, shadow, v = (a.double() for a in (step.x, step.r, step.p, step.shadow, step.v))
    y, z_scale = (p, 1.0)
    if isinstance(step, PBiCGSTAB):
        y, z_scale = step.y.double(), step.inverse.double()
    diagonal, unit, rho = step.diagonal.double(), step.unit[:, None], step.rho[:, None]

    def total(a: Tensor) -> Tensor:
        return a.sum(1, keepdim=True)

    along = total(shadow * v)
    d_along = u * total((shadow * v).abs())
    alpha = rho / along
    d_alpha = alpha.abs() * (d_along / along.abs() + u)
    s = r - alpha * v
    d_s = 2 * u * (r.abs() + (alpha * v).abs()) + d_alpha * v.abs()
    z, t = z_scale * s, diagonal * z_scale * s
    d_z, d_t = z_scale * d_s + u * z.abs(), diagonal * z_scale * d_s + 2 * u * t.abs()
    if given_t is not None:
        t, d_t = given_t.double(), torch.zeros_like(d_t)
    tt = total(t * t)
    omega = total(t * s) / tt
    d_ts = total(t.abs() * d_s + s.abs() * d_t + u * (t * s).abs())
    d_omega = (d_ts + omega.abs() * total(2 * t.abs() * d_t + u * t * t)) / tt + u * omega.abs()
    new_r = s - omega * t
    d_r = d_s + omega.abs() * d_t + d_omega * t.abs() + 2 * u * (s.abs() + (omega * t).abs())
    new_rho = total(shadow * new_r)
    d_rho = total(shadow.abs() * d_r + u * (shadow * s).abs() + u * (shadow * omega * t).abs())
    beta = (new_rho / rho) * (alpha / omega)
    d_beta = d_rho / (along * omega).abs()
    d_beta += beta.abs() * (d_along / along.abs() + d_omega / omega.abs() + 3 * u)
    back, size = p - omega * v, p.abs() + (omega * v).abs()
    d_p = d_r + d_beta * back.abs() + beta.abs() * (2 * u * size + d_omega * v.abs())
    d_p += 2 * u * (new_r.abs() + (beta * back).abs())
    moved = unit * ((alpha * y).abs() + (omega * z).abs())
    d_x = 4 * u * (x.abs() + moved)
    d_x += unit * (d_alpha * y.abs() + d_omega * z.abs() + omega.abs() * d_z)
    squares = unit**2 * new_r**2
    d_squares = unit**2 * (2 * new_r.abs() * d_r + d_r**2) + 2 * u * squares
    return {
        "x": Close(x + unit * (alpha * y + omega * z), d_x),
        "r": Close(new_r, d_r),
        "p": Close(new_r + beta * back, d_p),
        "rho": Close(new_rho[:, 0], d_rho[:, 0]),
        "rr_out": Close(squares.sum(1), d_squares.sum(1)),
    }


def solve(
    target: Target,
    matrix: Tensor,
    b: Tensor,
    rtol: float,
    maxiter: int,
    inverse: Tensor | None = None,
) -> BiCGSTAB:
    """Solve A x = b from x = 0, (B, ld, ld) and (B, ld), and return the last step's arguments.

    With `inverse` (B, ld), preconditioned by diag(inverse).
    """
    count = target.backend.partial_count(b.shape[1])
    make = bicgstab if inverse is None else pbicgstab
    step = make(*b.shape, b.dtype, count)
    step.x.zero_()
    step.unit = row_norms(b)
    for name in ("r", "p", "shadow"):
        setattr(step, name, (b.double() / step.unit[:, None]).to(b.dtype))
    step.rho.zero_()
    step.rr = partials(step.unit.square(), count)
    step.threshold, step.maxiter = rtol**2 * step.rr.sum(1), maxiter
    step.state[1] = 0
    step = step.to(target.device)
    matrix, inverse = (
        matrix.to(target.device),
        None if inverse is None else inverse.to(target.device),
    )

    def product(v: Tensor) -> Tensor:
        return (matrix @ v[:, :, None])[:, :, 0]

    for _ in range(maxiter + 1):
        if isinstance(step, PBiCGSTAB):
            step.y = inverse * step.p
        step.v = product(step.y if isinstance(step, PBiCGSTAB) else step.p)
        step.launch_dots(target.backend)
        step.launch_half_step(target.backend)
        if isinstance(step, PBiCGSTAB):
            step.z = inverse * step.s
        step.t = product(step.z if isinstance(step, PBiCGSTAB) else step.s)
        step.launch_half_dots(target.backend)
        step.launch_step(target.backend)
        step.rr, step.rr_out = step.rr_out, step.rr
        step.state, step.state_out = step.state_out, step.state
        if (step.state[0] >= 0).all():
            return step.to("cpu")
    raise AssertionError("a system still runs after maxiter iterations")
