"""The largest eigenvalue of each system's matrix, by power iteration."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.linear_solve.probes import orthonormal, repeated
from tritonimplicit.vectors import Layout

_FAILURES = 1e-3
"""How often, at most, over random starts, an estimate may fall below half the eigenvalue."""


def largest_eigenvalue(product: Callable[[Tensor], Tensor], layout: Layout) -> Tensor:
    """(B,) float64: about max |eigenvalue| of each system's symmetric matrix, v -> `product(v)`.

    For positive semidefinite matrices it lies between half of it and all of it, but for one random
    start in a thousand: 0.824 sqrt(n) / 2^(k - 1/2) bounds the chance of less after k products
    (Kuczynski and Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos
    algorithms with a random start", SIAM J. Matrix Anal. Appl. 13, 1992, theorem 4.1). That makes
    k = 14 for n = 100, and 20 for a million. The start is the same at every call.
    """
    v = repeated(orthonormal(layout, 1, seed=0)[0], layout)
    for _ in range(_products(layout.n)):
        av = product(v)
        size = kernels.row_norms(av)
        # A v = 0 keeps v: no direction, but no 0/0 either.
        scale = torch.where(size > 0, size, 1.0).to(v.dtype)[:, None]
        v = torch.where((size == 0)[:, None], v, av / scale)
    return size


def _products(n: int) -> int:
    return math.ceil(0.5 + math.log2(0.824 * math.sqrt(n) / _FAILURES))
