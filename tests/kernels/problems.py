"""Batched systems with known answers, and the buffers of a step: shared by the kernels' tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonimplicit_kernels import Backend, status

F64 = torch.float64
DTYPES = [torch.float32, F64]


def pad16(n: int) -> int:
    return -(-n // 16) * 16


def randn(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """Normal numbers by a generator of their own; rows padded with zeros to a multiple of 16."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(*shape[:-1], pad16(shape[-1]), dtype=dtype)
    values[..., : shape[-1]] = torch.randn(*shape, generator=generator, dtype=F64)
    return values


def like(tensor: Tensor) -> Tensor:
    """An output's memory before the launch: NaN, or a status that does not exist."""
    return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 99)


@dataclass
class Step:
    """The arguments that `cg_step` and `neumann_step` share."""

    x: Tensor
    rr: Tensor
    state: Tensor
    threshold: Tensor
    maxiter: int
    rr_out: Tensor
    state_out: Tensor
    residual_sq: Tensor

    def to(self, device: str) -> Step:
        """A copy, every tensor with memory of its own."""
        moved = {
            name: value.clone().to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return replace(self, **moved)


@dataclass
class CG(Step):
    """All that a CG iteration reads and writes."""

    r: Tensor
    p: Tensor
    ap: Tensor
    dots: Tensor

    def run(self, backend: Backend) -> CG:
        s = self
        backend.cg_dots(s.p, s.ap, s.state, s.dots)
        return self.step(backend)

    def step(self, backend: Backend) -> CG:
        s = self
        backend.cg_step(
            *(s.x, s.r, s.p, s.ap, s.dots, s.rr, s.state, s.threshold),
            *(s.maxiter, s.rr_out, s.state_out, s.residual_sq),
        )
        return self


@dataclass
class Neumann(Step):
    """All that a Richardson iteration reads and writes."""

    ax: Tensor
    b: Tensor
    alpha: Tensor
    limit: Tensor

    def run(self, backend: Backend) -> Neumann:
        s = self
        backend.neumann_step(
            *(s.x, s.ax, s.b, s.alpha, s.rr, s.state, s.threshold),
            *(s.limit, s.maxiter, s.rr_out, s.state_out, s.residual_sq),
        )
        return self


def running(batch: int) -> Tensor:
    state = torch.full((2, batch), status.RUNNING, dtype=torch.int32)
    state[1] = torch.arange(batch)
    return state


def partials(sums: Tensor, count: int) -> Tensor:
    """Split sums (...,) into (..., count) uneven partial sums."""
    weights = torch.arange(1, count + 1, dtype=F64)
    return (sums[..., None] * (weights / weights.sum())).contiguous()


def cg(batch: int, n: int, dtype: torch.dtype = F64, count: int = 1, seed: int = 0) -> CG:
    """An iteration in the middle of a solve, with p.Ap > 0 and unlike r and p."""
    x, r, p = (randn(batch, n, seed=seed + k, dtype=dtype) for k in range(3))
    scale = torch.linspace(1, 2, x.shape[1], dtype=dtype)
    rr = partials(r.double().square().sum(1), count)
    return CG(
        x=x,
        rr=rr,
        state=running(batch),
        threshold=torch.zeros(batch, dtype=F64),
        maxiter=1000,
        rr_out=like(rr),
        state_out=like(running(batch)),
        residual_sq=torch.full((batch,), 7.0, dtype=F64),
        r=r,
        p=p,
        ap=p * scale,
        dots=like(torch.stack([rr, rr])),
    )


def neumann(batch: int, n: int, dtype: torch.dtype = F64, count: int = 1, seed: int = 0) -> Neumann:
    """An iteration in the middle of a solve."""
    x, ax, b = (randn(batch, n, seed=seed + k, dtype=dtype) for k in range(3))
    rr = partials(torch.linspace(1, 2, batch, dtype=F64), count)
    return Neumann(
        x=x,
        rr=rr,
        state=running(batch),
        threshold=torch.zeros(batch, dtype=F64),
        maxiter=1000,
        rr_out=like(rr),
        state_out=like(running(batch)),
        residual_sq=torch.full((batch,), 7.0, dtype=F64),
        ax=ax,
        b=b,
        alpha=torch.linspace(0.1, 0.2, batch, dtype=F64),
        limit=torch.full((batch,), torch.inf, dtype=F64),
    )
