"""Linear systems from benign to vicious, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SPD, GENERAL, INDEFINITE = "positive definite", "nonsymmetric", "indefinite"


@dataclass(frozen=True)
class System:
    """A x = b: (n, n) and (n,), or batches of them, (B, n, n) and (B, n)."""

    about: str
    kind: str
    a: Tensor
    b: Tensor


def with_spectrum(values: Tensor, rng: torch.Generator) -> Tensor:
    """Symmetric, with random eigenvectors: (..., n) -> (..., n, n)."""
    q, _ = torch.linalg.qr(torch.randn(*values.shape, values.shape[-1], generator=rng).double())
    matrix: Tensor = (q * values[..., None, :]) @ q.mT
    return (matrix + matrix.mT) / 2


def strakos(n: int, low: float, high: float, rho: float) -> Tensor:
    """Eigenvalues that gather at the low end: CG loses its orthogonality, and restarts in effect.

    Strakos, "On the real convergence rate of the conjugate gradient method", Linear Algebra Appl.
    154-156, 1991.
    """
    i = torch.arange(n).double()
    return low + i / (n - 1) * (high - low) * rho ** (n - 1 - i)


def spd_benign(rng: torch.Generator) -> tuple[str, str, Tensor]:
    n = 500
    matrix = with_spectrum(torch.linspace(1, 100, n).double(), rng)
    return f"n = {n}, condition 100", SPD, matrix


def spd_strakos(rng: torch.Generator) -> tuple[str, str, Tensor]:
    values = strakos(48, 0.1, 100.0, 0.8)
    return "Strakos's matrix, n = 48, condition 1000, rho 0.8", SPD, with_spectrum(values, rng)


def spd_batch(rng: torch.Generator) -> tuple[str, str, Tensor]:
    systems, n = 64, 100
    conditions = torch.logspace(0, 3, systems).double()
    steps = torch.linspace(0, 1, n).double()
    matrices = with_spectrum(conditions[:, None] ** (steps - 1), rng)
    return f"{systems} systems, n = {n}, conditions from 1 to 1e3", SPD, matrices


def general_benign(rng: torch.Generator) -> tuple[str, str, Tensor]:
    n = 500
    noise = torch.randn(n, n, generator=rng).double()
    return f"identity and noise of norm 1, n = {n}", GENERAL, torch.eye(n) + 0.5 * noise / n**0.5


def general_grcar(rng: torch.Generator) -> tuple[str, str, Tensor]:
    n = 100
    matrix = torch.ones(n, n).double().triu().tril(3) - torch.diag(torch.ones(n - 1).double(), -1)
    return f"Grcar's matrix, n = {n}: far from normal", GENERAL, matrix


def indefinite_benign(rng: torch.Generator) -> tuple[str, str, Tensor]:
    n = 500
    half = torch.linspace(1, 10, n // 2).double()
    matrix = with_spectrum(torch.cat([half, -half]), rng)
    return f"n = {n}, eigenvalues in ±[1, 10]", INDEFINITE, matrix


def indefinite_strakos(rng: torch.Generator) -> tuple[str, str, Tensor]:
    values = strakos(48, 0.1, 100.0, 0.8)
    values[::4] = -values[::4]
    about = "n = 48, Strakos's eigenvalues, every fourth negative"
    return about, INDEFINITE, with_spectrum(values, rng)


MAKERS: dict[str, Callable[[torch.Generator], tuple[str, str, Tensor]]] = {
    "spd-benign": spd_benign,
    "spd-strakos": spd_strakos,
    "spd-batch": spd_batch,
    "general-benign": general_benign,
    "general-grcar": general_grcar,
    "indefinite-benign": indefinite_benign,
    "indefinite-strakos": indefinite_strakos,
}


def system(name: str, device: torch.device) -> System:
    """The system of this name, with a random right-hand side."""
    rng = torch.Generator().manual_seed(0)
    about, kind, matrix = MAKERS[name](rng)
    b = torch.randn(matrix.shape[:-1], generator=rng).double()
    return System(about, kind, matrix.double().to(device), b.to(device))
