"""Random vectors to ask a matrix with: the same in every system, on every device, at every call."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit.vectors import Layout


def rademacher(layout: Layout, count: int, seed: int) -> Tensor:
    """(count, ld): independent signs, zero in the padding."""
    signs = torch.randint(2, (count, layout.n), generator=_generator(seed), device="cpu")
    return _padded(2 * signs - 1, layout)


def orthonormal(layout: Layout, count: int, seed: int) -> Tensor:
    """(count, ld): orthonormal rows that span a Gaussian random subspace; count <= n."""
    gaussian = torch.randn(
        layout.n, count, generator=_generator(seed), dtype=torch.float64, device="cpu"
    )
    return _padded(torch.linalg.qr(gaussian).Q.mT, layout)


def repeated(row: Tensor, layout: Layout) -> Tensor:
    """(ld,) -> (B, ld): the same vector for each system, in memory of its own."""
    return row.expand(layout.systems, layout.ld).contiguous()


def _generator(seed: int) -> torch.Generator:
    # Of its own, so that a solve leaves torch's global random numbers alone.
    return torch.Generator(device="cpu").manual_seed(seed)


def _padded(values: Tensor, layout: Layout) -> Tensor:
    """(count, n) -> (count, ld) on the layout's device, in its working precision."""
    rows = torch.zeros(len(values), layout.ld, dtype=layout.dtype, device=layout.device)
    rows[:, layout.elements()] = values.to(rows)
    return rows
