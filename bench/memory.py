"""Peak memory of a solve on a single leaf, in vectors, beyond b and the operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import tritonimplicit
from bench.case import OURS, Absent, Case, Entry, MemoryGoal, Problem, Run, Setting
from bench.libraries import library

ITERATIONS = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "cg": {"rtol": 0.0, "maxiter": ITERATIONS},
    "normal_cg": {"rtol": 0.0, "maxiter": ITERATIONS},
    "neumann": {"ns": True, "alpha": 0.6, "maxiter": ITERATIONS},
}
FACTORIES = {"cg": "solve_cg", "normal_cg": "solve_normal_cg", "neumann": "solve_inv"}
GOALS = {"cg": 4.0, "normal_cg": 5.0, "neumann": 2.0}
TOLERANCE = 1e-5  # 20 iterations, of which each at least halves the error, and float32 rounding


class Diagonal:
    """v -> d v into memory of the operator's own, its own transpose."""

    def __init__(self, d: Tensor):
        self._d, self._out = d, torch.empty_like(d)

    def __call__(self, v: Tensor) -> Tensor:
        return torch.mul(self._d, v, out=self._out)

    @property
    def T(self) -> Diagonal:
        return self


def entry(
    name: str, module: ModuleType, solver: str, matvec: Callable[[Tensor], Tensor], b: Tensor
) -> Entry:
    solve = getattr(module.linear_solve, FACTORIES[solver])(**SETTINGS[solver])

    def prepare() -> Run:
        return lambda: (solve(matvec, b),)

    return Entry(name, prepare)


def build(solver: str, setting: Setting) -> Problem:
    n = 1_000_000 if setting.quick else 10_000_000
    rng = torch.Generator(setting.device).manual_seed(0)
    d = 1 + torch.rand(n, generator=rng, device=setting.device)
    b = torch.randn(n, generator=rng, device=setting.device)
    entries: list[Entry | Absent] = [
        entry(OURS, tritonimplicit, solver, Diagonal(d), b),
        entry(f"{OURS}, result by operator", tritonimplicit, solver, lambda v: d * v, b),
    ]
    torchopt = library("TorchOpt")
    if isinstance(torchopt, Absent):
        entries.append(torchopt)
    else:
        entries.append(entry("TorchOpt", torchopt, solver, lambda v: d * v, b))
    return Problem(
        about=f"diagonal matrix, n = {n:,}, {ITERATIONS} iterations, float32",
        expected=(b.double() / d.double(),),
        tolerance=TOLERANCE,
        entries=entries,
        vector_bytes=b.nbytes,
        goals=[MemoryGoal(GOALS[solver])],
    )


CASES = [
    Case(f"memory/{solver}", f"peak memory of {solver}", partial(build, solver))
    for solver in SETTINGS
]
