"""Small dense systems, and where a solve of them goes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tests.kernels.problems import F64, Target
from tritonimplicit_kernels import row_norms


@dataclass
class DenseCG:
    """What `dense_cg` takes, in its order."""

    a: Tensor
    rhs: Tensor
    threshold: Tensor
    maxiter: int
    solution: Tensor
    state: Tensor
    residual_sq: Tensor

    def on(self, target: Target) -> DenseCG:
        """Return a solved copy, back on the CPU."""
        given = [v.to(target.device) if isinstance(v, Tensor) else v for v in self._values()]
        given = [v.clone() if isinstance(v, Tensor) else v for v in given]
        target.backend.dense_cg(*given)
        return DenseCG(*(v.to("cpu") if isinstance(v, Tensor) else v for v in given))

    def select(self, systems: list[int]) -> DenseCG:
        """Return a copy with these systems alone."""
        return DenseCG(
            *(self.a[systems], self.rhs[systems], self.threshold[systems], self.maxiter),
            *(self.solution[systems], self.state[:, systems], self.residual_sq[systems]),
        )

    def residual_norms(self) -> Tensor:
        """(B,) true residual norms of the solution, in float64."""
        product = (self.a.double() @ self.solution.double()[:, :, None])[:, :, 0]
        return (self.rhs.double() - product).norm(dim=1)

    def _values(self) -> list[Tensor | int]:
        return [getattr(self, field.name) for field in fields(self)]


def spd(batch: int, n: int, condition: float = 10.0) -> Tensor:
    """Symmetric matrices of this condition number, with eigenvalues up to 1."""
    generator = torch.Generator().manual_seed(7)
    q = torch.linalg.qr(torch.randn(batch, n, n, generator=generator, dtype=F64))[0]
    matrix = (
        q * torch.logspace(0, 1, n, dtype=F64).div_(10) ** torch.tensor(condition).log10()
    ) @ q.mT
    return (matrix + matrix.mT) / 2


def dense_cg(
    batch: int, n: int, dtype: torch.dtype, _: int = 1, rtol: float = 1e-4, condition: float = 10.0
) -> DenseCG:
    """Return positive definite systems, outputs poisoned."""
    generator = torch.Generator().manual_seed(n)
    rhs = torch.randn(batch, n, generator=generator, dtype=F64).to(dtype)
    return DenseCG(
        a=spd(batch, n, condition).to(dtype),
        rhs=rhs,
        threshold=(rtol * row_norms(rhs)).square(),
        maxiter=1000,
        solution=torch.full_like(rhs, torch.nan),
        state=torch.full((2, batch), 99, dtype=torch.int32),
        residual_sq=torch.full((batch,), torch.nan, dtype=F64),
    )
