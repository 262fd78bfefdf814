"""The arguments of a step, and an oracle for them: what the kernels' tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from tritonimplicit_kernels import Backend, row_norms, row_weighted_squares, status

F64 = torch.float64
DTYPES = [torch.float32, F64]
EPS64 = torch.finfo(F64).eps

AnyStep = TypeVar("AnyStep", bound="Step")


@dataclass
class Target:
    """A backend, and a device that it runs on."""

    backend: Backend
    device: str

    def run(self, step: AnyStep) -> AnyStep:
        """Do one step on a copy of its arguments, and return them, back on the CPU."""
        moved = step.to(self.device)
        moved.launch(self.backend)
        return moved.to("cpu")


@dataclass
class Step:
    """What `cg_step` and `neumann_step` both take."""

    x: Tensor
    rr: Tensor
    state: Tensor
    threshold: Tensor
    maxiter: int
    rr_out: Tensor
    state_out: Tensor
    residual_sq: Tensor

    def launch(self, backend: Backend) -> None:
        raise NotImplementedError

    def _map(self: AnyStep, change: Callable[[str, Tensor], Tensor]) -> AnyStep:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(name, value) for name, value in tensors.items()})

    def to(self: AnyStep, device: str) -> AnyStep:
        """Return a copy, each tensor with memory of its own."""
        return self._map(lambda name, value: value.clone().to(device))

    def select(self: AnyStep, systems: list[int]) -> AnyStep:
        """Return a copy with these systems alone."""
        second = (
            "state",
            "state_out",
            "dots",
            "shadow_dots",
            "half_dots",
        )  # the batch is their second dimension
        return self._map(
            lambda name, value: (value[:, systems] if name in second else value[systems]).clone()
        )


@dataclass
class CG(Step):
    """What both launches of a CG iteration take."""

    r: Tensor
    p: Tensor
    ap: Tensor
    dots: Tensor

    def launch(self, backend: Backend) -> None:
        self.launch_dots(backend)
        self.launch_step(backend)

    def launch_dots(self, backend: Backend) -> None:
        backend.cg_dots(self.p, self.ap, self.state, self.dots)

    def launch_step(self, backend: Backend) -> None:
        backend.cg_step(
            *(self.x, self.r, self.p, self.ap, self.dots, self.rr, self.state, self.threshold),
            *(self.maxiter, self.rr_out, self.state_out, self.residual_sq),
        )


@dataclass
class PCG(CG):
    """What both launches of a CG iteration take with a diagonal preconditioner."""

    d: Tensor
    rz: Tensor
    rz_out: Tensor

    def launch(self, backend: Backend) -> None:
        self.launch_dots(backend)
        self.launch_step(backend)

    def launch_dots(self, backend: Backend) -> None:
        backend.pcg_dots(self.p, self.ap, self.d, self.state, self.dots)

    def launch_step(self, backend: Backend) -> None:
        backend.pcg_step(
            *(self.x, self.r, self.p, self.ap, self.d, self.dots, self.rr, self.rz, self.state),
            *(self.threshold, self.maxiter, self.rr_out, self.rz_out, self.state_out),
            self.residual_sq,
        )


@dataclass
class Neumann(Step):
    """What a Richardson iteration takes."""

    ax: Tensor
    b: Tensor
    alpha: Tensor
    limit: Tensor

    def launch(self, backend: Backend) -> None:
        backend.neumann_step(
            *(self.x, self.ax, self.b, self.alpha, self.rr, self.state, self.threshold),
            *(self.limit, self.maxiter, self.rr_out, self.state_out, self.residual_sq),
        )


def randn(batch: int, n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers, each row padded with zeros to a multiple of 16."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(batch, -(-n // 16) * 16, dtype=dtype)
    values[:, :n] = torch.randn(batch, n, generator=generator, dtype=F64)
    return values


def partials(sums: Tensor, count: int) -> Tensor:
    """Split sums (B,) into `count` uneven partial sums each."""
    weights = torch.arange(1, count + 1, dtype=F64)
    return sums[:, None] * (weights / weights.sum())


def _common(x: Tensor, rr: Tensor) -> dict[str, Tensor | int]:
    """Outputs are poisoned: NaN, or a status that does not exist."""
    batch = x.shape[0]
    state = torch.full((2, batch), status.RUNNING, dtype=torch.int32)
    state[1] = torch.arange(batch)
    return {
        "x": x,
        "rr": rr,
        "state": state,
        "threshold": torch.zeros(batch, dtype=F64),
        "maxiter": 1000,
        "rr_out": torch.full_like(rr, torch.nan),
        "state_out": torch.full_like(state, 99),
        "residual_sq": torch.full((batch,), torch.nan, dtype=F64),
    }


def cg(batch: int, n: int, dtype: torch.dtype, count: int = 1) -> CG:
    """Return an iteration amid a solve with a diagonal matrix between 1 and 2."""
    x, r, p = (randn(batch, n, dtype, seed) for seed in range(3))
    rr = partials(r.double().square().sum(1), count)
    ap = p * torch.linspace(1, 2, x.shape[1], dtype=dtype)
    dots = torch.full((2, *rr.shape), torch.nan, dtype=F64)
    return CG(**_common(x, rr), r=r, p=p, ap=ap, dots=dots)


def pcg(batch: int, n: int, dtype: torch.dtype, count: int = 1) -> PCG:
    """Return an iteration amid the same solve with a diagonal preconditioner."""
    step = cg(batch, n, dtype, count)
    d = torch.linspace(1, 0.5, step.x.shape[1], dtype=dtype).repeat(batch, 1)
    rz = partials((d.double() * step.r.double().square()).sum(1), count)
    return PCG(**vars(step), d=d, rz=rz, rz_out=torch.full_like(rz, torch.nan))


def neumann(batch: int, n: int, dtype: torch.dtype, count: int = 1) -> Neumann:
    """Return an iteration amid a solve; as in one, `rr` is not of the residual b - ax."""
    x, ax, b = (randn(batch, n, dtype, seed) for seed in range(3))
    rr = partials(torch.linspace(1, 2, batch, dtype=F64), count)
    alpha = torch.linspace(0.1, 0.2, batch, dtype=F64)
    limit = torch.full((batch,), torch.inf, dtype=F64)
    return Neumann(**_common(x, rr), ax=ax, b=b, alpha=alpha, limit=limit)


@dataclass
class Close:
    """An expected value, and how far rounding may take the result from it."""

    value: Tensor
    bound: Tensor

    def check(self, actual: Tensor) -> None:
        error = (actual.double() - self.value).abs()
        assert (error <= self.bound).all(), f"{(error - self.bound).max()} beyond the bound"


def _units(dtype: torch.dtype, n: int) -> float:
    """Bound the relative error of a scalar made of sums of n float64 terms, rounded to `dtype`.

    Adding n numbers in any order errs by at most n eps, and by sqrt(n) eps where rounding errors
    are independent; four such sums and divisions make alpha^2 Ap.Ap.
    """
    return torch.finfo(dtype).eps + 4 * (n**0.5 + 1) * EPS64


def cg_oracle(step: CG) -> dict[str, Close]:
    """Do the textbook's iteration in float64: Hestenes and Stiefel, with the beta it implies."""
    x, r, p, ap = (v.double() for v in (step.x, step.r, step.p, step.ap))
    d = step.d.double() if isinstance(step, PCG) else torch.ones_like(r)
    rz = (step.rz if isinstance(step, PCG) else step.rr).sum(1, keepdim=True)
    pap, apmap = (p * ap).sum(1, keepdim=True), (d * ap * ap).sum(1, keepdim=True)
    alpha = rz / pap
    predicted = alpha**2 * apmap
    beta = (predicted - rz).clamp_min(0) / rz
    new_r = r - alpha * ap
    unit = _units(step.x.dtype, step.x.shape[1])
    r_bound = 2 * unit * (r.abs() + (alpha * ap).abs())
    z_bound = d * r_bound + 2 * unit * (d * new_r).abs()
    sums = {"rr_out": new_r**2, "rz_out": d * new_r**2}
    bounds = {
        "rr_out": 2 * new_r.abs() * r_bound + r_bound**2,
        "rz_out": d * (2 * new_r.abs() * r_bound + r_bound**2),
    }
    return {
        "x": Close(x + alpha * p, 2 * unit * (x.abs() + (alpha * p).abs())),
        "r": Close(new_r, r_bound),
        "p": Close(d * new_r + beta * p, z_bound + 2 * unit * (predicted / rz + 1) * p.abs()),
        **{
            name: Close(value.sum(1), bounds[name].sum(1) + unit * value.sum(1))
            for name, value in sums.items()
            if hasattr(step, name)
        },
    }


def neumann_oracle(step: Neumann) -> dict[str, Close]:
    """Do Richardson's iteration in float64."""
    x, ax, b = (v.double() for v in (step.x, step.ax, step.b))
    residual, alpha = b - ax, step.alpha[:, None]
    unit = _units(step.x.dtype, step.x.shape[1])
    bound = unit * residual.abs()
    squares = (residual * residual).sum(1)
    return {
        "x": Close(x + alpha * residual, 2 * unit * (x.abs() + (alpha * residual).abs())),
        "rr_out": Close(squares, (2 * residual.abs() * bound + bound**2).sum(1) + unit * squares),
    }


def solve_cg(
    target: Target,
    diagonal: Tensor,
    b: Tensor,
    rtol: float,
    maxiter: int,
    d: Tensor | None = None,
) -> Step:
    """Solve diag(diagonal) x = b from x = 0, and return the last step's arguments.

    With `d` (B, ld), preconditioned by diag(d).
    """
    count = target.backend.partial_count(b.shape[1])
    rr = partials(row_norms(b).square(), count)
    step = CG(
        **_common(torch.zeros_like(b), rr),
        r=b,
        p=b if d is None else d * b,
        ap=b,
        dots=torch.zeros(2, *rr.shape, dtype=F64),
    )
    if d is not None:
        rz = partials(row_weighted_squares(b, d), count)
        step = PCG(**vars(step), d=d, rz=rz, rz_out=torch.full_like(rz, torch.nan))
    step.threshold, step.maxiter = rtol**2 * rr.sum(1), maxiter
    step.state[1] = 0
    step, diagonal = step.to(target.device), diagonal.to(target.device)

    def matvec(step: CG) -> None:
        torch.mul(diagonal, step.p, out=step.ap)

    return _iterate(target, step, matvec)


def solve_neumann(
    target: Target, diagonal: Tensor, b: Tensor, alpha: float, rtol: float, maxiter: int
) -> Step:
    """Solve diag(diagonal) x = b from x = 0, and return the last step's arguments."""
    batch = b.shape[0]
    rr = partials(row_norms(b).square(), target.backend.partial_count(b.shape[1]))
    step = Neumann(
        **_common(torch.zeros_like(b), rr),
        ax=b,
        b=b,
        alpha=torch.full((batch,), alpha, dtype=F64),
        limit=1e8 * rr.sum(1),
    )
    step.threshold, step.maxiter = rtol**2 * rr.sum(1), maxiter
    step.state[1] = 0
    step, diagonal = step.to(target.device), diagonal.to(target.device)

    def matvec(step: Neumann) -> None:
        torch.mul(diagonal, step.x, out=step.ax)

    return _iterate(target, step, matvec)


def _iterate(target: Target, step: AnyStep, matvec: Callable[[AnyStep], None]) -> AnyStep:
    for _ in range(step.maxiter + 1):
        matvec(step)
        step.launch(target.backend)
        step.rr, step.rr_out = step.rr_out, step.rr
        step.state, step.state_out = step.state_out, step.state
        if isinstance(step, PCG):
            step.rz, step.rz_out = step.rz_out, step.rz
        if (step.state[0] >= 0).all():
            return step.to("cpu")
    raise AssertionError("a system still runs after maxiter iterations")
