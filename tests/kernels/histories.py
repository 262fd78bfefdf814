"""The arguments of the ops on a basis or history of vectors, and oracles for them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tests.kernels.problems import EPS64, F64, Close, partials, randn
from tritonimplicit_kernels import Backend, status

AnyHistory = TypeVar("AnyHistory", bound="History")
POISON = torch.nan


@dataclass
class History:
    """Tensors of B systems; those named in `FIRST` have the systems in another dimension."""

    state: Tensor
    count: int

    SECOND = ("state", "state_out", "squares")
    HISTORIES = ("basis", "residuals", "moves", "first", "second", "row", "products")

    def launch(self, backend: Backend) -> None:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def to(self: AnyHistory, device: str) -> AnyHistory:
        """Return a copy, each tensor with memory of its own."""
        return replace(self, **{n: v.clone().to(device) for n, v in self.tensors().items()})

    def select(self: AnyHistory, systems: list[int]) -> AnyHistory:
        """Return a copy with these systems alone."""
        second = self.SECOND + self.HISTORIES
        return replace(
            self,
            **{
                name: (value[:, systems] if name in second else value[systems]).clone()
                for name, value in self.tensors().items()
            },
        )


@dataclass
class Arnoldi(History):
    """What the three launches of an Arnoldi step take."""

    w: Tensor
    basis: Tensor
    first: Tensor
    w_out: Tensor
    second: Tensor
    ww: Tensor
    left: Tensor
    column: Tensor
    norm: Tensor
    rr: Tensor
    threshold: Tensor
    maxiter: int
    rr_out: Tensor
    state_out: Tensor
    residual_sq: Tensor

    def launch(self, backend: Backend) -> None:
        self.launch_dots(backend)
        self.launch_project(backend)
        self.launch_step(backend)

    def launch_dots(self, backend: Backend) -> None:
        backend.multi_dot(self.w, self.basis, self.count, self.state, self.first)

    def launch_project(self, backend: Backend) -> None:
        backend.arnoldi_project(
            *(self.w, self.basis, self.count, self.first, self.state, self.w_out),
            *(self.second, self.ww),
        )

    def launch_step(self, backend: Backend) -> None:
        backend.arnoldi_step(
            *(self.w_out, self.basis, self.count, self.first, self.second, self.ww, self.left),
            *(self.column, self.norm, self.rr, self.state, self.threshold, self.maxiter),
            *(self.rr_out, self.state_out, self.residual_sq),
        )


@dataclass
class Anderson(History):
    """What the two launches of an Anderson step take."""

    image: Tensor
    z: Tensor
    z_before: Tensor
    residual: Tensor
    residuals: Tensor
    moves: Tensor
    coefficients: Tensor
    slot: int
    beta: float
    row: Tensor
    products: Tensor
    squares: Tensor
    z_out: Tensor

    def launch(self, backend: Backend) -> None:
        self.launch_dots(backend)
        self.launch_mix(backend)

    def launch_dots(self, backend: Backend) -> None:
        backend.anderson_dots(
            *(self.image, self.z, self.z_before, self.residual, self.residuals, self.moves),
            *(self.slot, self.count, self.beta, self.state, self.row, self.products, self.squares),
        )

    def launch_mix(self, backend: Backend) -> None:
        backend.anderson_mix(
            *(self.z, self.residual, self.moves, self.coefficients, self.count, self.beta),
            *(self.state, self.z_out),
        )


def _state(batch: int) -> Tensor:
    state = torch.full((2, batch), status.RUNNING, dtype=torch.int32)
    state[1] = torch.arange(batch)
    return state


def arnoldi(
    batch: int, n: int, dtype: torch.dtype, count: int = 3, capacity: int = 5, parts: int = 1
) -> Arnoldi:
    """Return an iteration amid a cycle; what is not there yet, or is written, is NaN."""
    w = randn(batch, n, dtype, seed=0)
    ld = w.shape[1]
    spread = torch.stack([randn(batch, n, F64, seed) for seed in range(1, count + 1)], 2)
    basis = torch.full((capacity, batch, ld), POISON, dtype=dtype)
    basis[:count] = torch.linalg.qr(spread)[0].permute(2, 0, 1)
    left = torch.full((batch, capacity + 1), POISON, dtype=F64)
    left[:, :count] = torch.linspace(1, 2, count, dtype=F64)
    norm = torch.linspace(1, 2, batch, dtype=F64)
    rr = partials((norm**2 / left[:, :count].square().sum(1)), parts)
    sums = torch.full((capacity, batch, parts), POISON, dtype=F64)
    return Arnoldi(
        state=_state(batch),
        count=count,
        w=w,
        basis=basis,
        first=sums,
        w_out=torch.full_like(w, POISON),
        second=sums.clone(),
        ww=torch.full_like(rr, POISON),
        left=left,
        column=torch.full_like(left, POISON),
        norm=norm,
        rr=rr,
        threshold=torch.zeros(batch, dtype=F64),
        maxiter=1000,
        rr_out=torch.full_like(rr, POISON),
        state_out=torch.full((2, batch), 99, dtype=torch.int32),
        residual_sq=torch.full((batch,), POISON, dtype=F64),
    )


def anderson(
    batch: int,
    n: int,
    dtype: torch.dtype,
    count: int = 3,
    capacity: int = 5,
    parts: int = 1,
    slot: int = 1,
) -> Anderson:
    """Return an iteration amid a solve; what is not there yet, or is written, is NaN."""
    image, z, z_before, residual = (randn(batch, n, dtype, seed) for seed in range(4))
    history = torch.full((capacity, *z.shape), POISON, dtype=dtype)
    residuals, moves = history.clone(), history
    for j in set(range(count)) - {slot}:
        residuals[j], moves[j] = (randn(batch, n, dtype, seed) for seed in (10 + j, 20 + j))
    sums = torch.full((capacity, batch, parts), POISON, dtype=F64)
    coefficients = torch.full((batch, capacity), POISON, dtype=F64)
    coefficients[:, :count] = torch.linspace(-1, 1, count, dtype=F64)
    return Anderson(
        state=_state(batch),
        count=count,
        image=image,
        z=z,
        z_before=z_before,
        residual=residual,
        residuals=residuals,
        moves=moves,
        coefficients=coefficients,
        slot=slot,
        beta=0.7,
        row=sums,
        products=sums.clone(),
        squares=torch.full((2, batch, parts), POISON, dtype=F64),
        z_out=torch.full_like(z, POISON),
    )


def dots_oracle(vectors: Tensor, v: Tensor, eps: float) -> Close:
    """vectors[j].v as (k, B): sqrt(n) eps of the absolute sum, rounding being independent."""
    products = vectors.double() * v.double()
    size = products.abs().sum(-1)
    return Close(products.sum(-1), (v.shape[-1] ** 0.5 + 1) * max(eps, EPS64) * size)


def combination_oracle(v: Tensor, c: Tensor, vectors: Tensor, eps: float) -> Close:
    """v - sum c_j vectors[j] for c (k, B): each term and each sum rounds once."""
    terms = c[:, :, None] * vectors.double()
    size = v.double().abs() + terms.abs().sum(0)
    return Close(v.double() - terms.sum(0), (len(c) + 2) * eps * size)


_KNOWN_AS = {
    "multi_dot": {"products": "first"},
    "arnoldi_step": {"w": "w_out"},
}


def op_arguments(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the arguments of a registered op by name, without NaN."""
    make = anderson if op.startswith("anderson") else arnoldi
    step: History = make(3, 40, dtype, parts=2)
    schema = getattr(torch.ops.tritonimplicit, op).default._schema
    known_as = _KNOWN_AS.get(op, {})
    given = {a.name: getattr(step, known_as.get(a.name, a.name)) for a in schema.arguments}
    return {
        name: value.nan_to_num(0.5) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
