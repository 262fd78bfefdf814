"""Preconditioners: what a solver's field `M` may be, and what becomes of it on rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.linear_solve.base import check_count
from tritonimplicit.linear_solve.probes import orthonormal, rademacher, repeated
from tritonimplicit.linear_solve.rows import RowMatvec
from tritonimplicit.operators import Matvec

RowPreconditioner: TypeAlias = Callable[[Tensor], Tensor]
"""r -> M r on (B, ld) rows; the result is to be read only, and valid until the next call."""


@dataclass(frozen=True)
class Jacobi:
    """M = 1 / |diagonal of A + ridge I|, the diagonal estimated by `probes` matvecs a solve.

    Hutchinson's estimate: the mean of v * (A v) over vectors v of random signs (Bekas, Kokiopoulou
    and Saad, "An estimator for the diagonal of a matrix", Appl. Numer. Math. 57, 2007). For a
    diagonal matrix one probe is exact. Elsewhere the rest of row i is noise, of deviation
    sqrt(sum over j != i of a_ij^2 / probes): an estimate below the deviation that its own samples
    show is replaced by that, so that M is positive whatever the matrix. The probes follow from
    `seed` alone, and are the same for every system.
    """

    probes: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_positive("probes", self.probes)
        check_count("seed", self.seed)

    def on_rows(self, apply: RowMatvec) -> Diagonal:
        """Estimate the diagonals of all systems at once."""
        layout = apply.layout
        total = layout.zeros().double()
        squares = torch.zeros_like(total)
        for signs in rademacher(layout, self.probes, self.seed):
            sample = signs.double() * apply(repeated(signs, layout))
            total += sample
            squares += sample.square()
        mean = total / self.probes
        variance = (squares / self.probes - mean.square()).clamp_(min=0)
        size = torch.maximum(mean.abs(), (variance / self.probes).sqrt_())
        # A row that every probe found zero says nothing of its scale: take the most cautious one.
        largest = size.amax(1, keepdim=True)
        size = torch.where(size == 0, torch.where(largest == 0, 1.0, largest), size)
        return Diagonal(size.reciprocal_().to(layout.dtype))


@dataclass(frozen=True)
class Nystrom:
    """M from a randomised rank-`rank` approximation U diag(l) U^T of A, by `rank` matvecs a solve.

    For A symmetric positive semidefinite, best with a ridge m > 0:
    M = U diag(1 / (l + m)) U^T + (I - U U^T) / (l_min + m), which is the preconditioner of
    Frangella, Tropp and Udell, "Randomized Nystrom preconditioning" (SIAM J. Matrix Anal. Appl. 44,
    2023), algorithm 2.1 and equation 1.3, over l_min + m, so that M is about (A + m I)^-1 in scale
    too. The paper assumes m > 0. Without a ridge it is taken at m = 0, and good for as much as the
    spectrum falls within the rank. l + m is held at sqrt(n) eps times its largest, below which it
    is rounding. A `rank` above n is n. The test vectors follow from `seed` alone, and are the same
    for every system.
    """

    rank: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_positive("rank", self.rank)
        check_count("seed", self.seed)

    def on_rows(self, apply: RowMatvec) -> LowRankInverse:
        """Approximate the matrices of all systems at once."""
        layout = apply.layout
        unshifted = RowMatvec(apply.matvec, layout)
        test = orthonormal(layout, min(self.rank, layout.n), self.seed)
        # (B, l, ld)
        sketch = torch.stack([unshifted(repeated(row, layout)).clone() for row in test], 1)
        # The factorisations refuse what is not finite; the solver meets it in A again.
        sketch.masked_fill_(~sketch.isfinite().all(2).all(1)[:, None, None], 0.0)
        basis, eigenvalues = _nystrom(test, sketch)
        ridge = 0.0 if apply.ridge is None else apply.ridge
        shifted = eigenvalues + ridge  # (B, l)
        rounding = math.sqrt(layout.n) * torch.finfo(layout.dtype).eps
        shifted = torch.maximum(shifted, rounding * shifted.amax(1, keepdim=True))
        shifted = torch.where(shifted > 0, shifted, 1.0)  # A = 0 without a ridge
        rest = shifted.amin(1).reciprocal_()
        return LowRankInverse(basis, shifted.reciprocal() - rest[:, None], rest)


Preconditioner: TypeAlias = Matvec | Jacobi | Nystrom
"""r -> M r on pytrees shaped as b, for all systems at once, or how to estimate such an M."""


def check_preconditioner(M: object) -> None:
    """Raise TypeError for what is no preconditioner."""
    usable = M is None or callable(M) or isinstance(M, (Jacobi, Nystrom))
    if isinstance(M, type) or not usable:
        shown = f"class {M.__name__}" if isinstance(M, type) else type(M).__name__
        raise TypeError(f"M must be a function r -> M r, Jacobi() or Nystrom(rank), not {shown}.")


@dataclass(frozen=True)
class Diagonal:
    """r -> r * inverse; `inverse` is (B, ld)."""

    inverse: Tensor

    def __call__(self, r: Tensor) -> Tensor:
        """M r."""
        return r * self.inverse


@dataclass(frozen=True)
class LowRankInverse:
    """r -> U diag(weights) U^T r + rest * r; U (B, l, ld), weights (B, l) and rest (B,) float64."""

    basis: Tensor
    weights: Tensor
    rest: Tensor

    def __call__(self, r: Tensor) -> Tensor:
        """M r."""
        weights = self.weights * _inner(self.basis, r[:, None])
        low_rank = _combination(self.basis, weights.to(r.dtype))
        return low_rank.add_(r * self.rest.to(r.dtype)[:, None])


def row_preconditioner(M: Preconditioner | None, apply: RowMatvec) -> RowPreconditioner | None:
    """M for the system of `apply`, on (B, ld) rows; None where there is none.

    Jacobi and Nystrom ask the matrix here, once. A function is called as a matvec is, and its
    result checked alike: TypeError or ValueError where it does not fit b, RuntimeError where it
    requires grad or r was changed in place.
    """
    if M is None:
        return None
    if isinstance(M, (Jacobi, Nystrom)):
        return M.on_rows(apply)
    return RowMatvec(M, apply.layout, name="the preconditioner M")


def vmapped(M: Preconditioner | None, depth: int) -> Preconditioner | None:
    """M under `depth` vmaps over the systems; what asks the matrix itself sees them anyway."""
    if M is None or isinstance(M, (Jacobi, Nystrom)):
        return M
    for _ in range(depth):
        M = torch.vmap(M)
    return M


def _nystrom(test: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """U (B, l, ld), rows orthonormal, and l (B, l) float64 descending, from W and (A W)^T.

    The paper's algorithm 2.1, with the l x l matrices in float64, and eigenvalues in place of the
    Cholesky factor: where W^T A W has one that is negative, or rounding, its direction is left out,
    so that M is positive definite though A may not be.
    """
    eps = torch.finfo(sketch.dtype).eps
    shift = eps * torch.linalg.vector_norm(sketch, dim=(1, 2), dtype=torch.float64)  # (B,)
    shift = torch.where(shift > 0, shift, 1.0)[:, None]
    core = torch.stack([_inner(sketch, row) for row in test], 1)  # (B, l, l)
    core_values, core_vectors = torch.linalg.eigh(_aligned((core + core.mT) / 2))
    root = torch.where(core_values > shift, (core_values + shift).rsqrt(), 0.0)
    shifted = sketch + shift.to(sketch.dtype)[:, :, None] * test
    orthonormal_rows, upper = torch.linalg.qr(shifted.mT)  # (B, ld, l), (B, l, l)
    factor = _aligned(upper.double()) @ (core_vectors * root[:, None, :])
    rotation, singular, _ = torch.linalg.svd(factor)
    rank = len(test)
    rotation, singular = rotation[:, :rank, :rank], singular[:, :rank]
    columns = rotation.to(sketch.dtype).unbind(2)
    basis = torch.stack([_combination(orthonormal_rows.mT, column) for column in columns], 1)
    return basis, (singular.square() - shift).clamp(min=0)


def _aligned(small: Tensor) -> Tensor:
    """(B, l, l) float64 with zeros around, so that each matrix begins at a multiple of 64 bytes.

    LAPACK's rounding depends on where a matrix begins, and so on a system's place in the batch.
    """
    return torch.nn.functional.pad(small, (0, -small.shape[2] % 4, 0, -small.shape[1] % 4))


def _combination(rows: Tensor, weights: Tensor) -> Tensor:
    """(B, l, ld), (B, l) -> (B, ld): weighted sums of each system's rows, in a fixed order."""
    return (rows * weights[:, :, None]).sum(1)


def _inner(rows: Tensor, v: Tensor) -> Tensor:
    """(B, l, ld), (..., ld) -> (B, l) float64: the products of v with l rows of each system.

    By row_dots and not by a matrix product, whose rounding depends on how many systems there are.
    """
    products = kernels.row_dots(rows.flatten(0, 1), v.expand_as(rows).flatten(0, 1))
    return products.view(rows.shape[:2])


def _check_positive(name: str, value: object) -> None:
    check_count(name, value)
    if value == 0:
        raise ValueError(f"{name} must be at least 1.")
