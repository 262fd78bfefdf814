"""iMAML's hypergradient by libraries whose names are not ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from bench import jax_peers
from bench.case import Absent, Entry, Run, Setting, Tensors
from bench.imaml import Imaml
from bench.libraries import library
from bench.networks import Network

STEP = 0.1
"""Of the gradient step that hypertorch takes for the fixed-point map: it cancels."""


def hypertorch(problem: Imaml, solver: str, iterations: int) -> Entry | Absent:
    """Its CG on I - J^T of a gradient step."""
    name = "hypertorch"
    if solver != "cg":
        return Absent(name, "its normal equations solve with the transposed matrix: not compared")
    module = library(name)
    if isinstance(module, Absent):
        return module

    def fixed_point_map(params: list[Tensor], meta: list[Tensor]) -> list[Tensor]:
        slope = grad(problem.objective)(tuple(params), tuple(meta), problem.x, problem.y)
        return [p - STEP * s for p, s in zip(params, slope, strict=True)]

    def outer(params: list[Tensor], meta: list[Tensor]) -> Tensor:
        products = [p * c for p, c in zip(params, problem.cotangents, strict=True)]
        return torch.stack([p.sum() for p in products]).sum()

    def prepare() -> Run:
        params, meta = list(problem.solution), list(problem.meta)
        settings: dict[str, Any] = {"tol": 0.0, "set_grad": False}
        return lambda: tuple(
            module.CG(params, meta, iterations, fixed_point_map, outer, **settings)
        )

    return Entry(name, prepare)


def jaxopt(
    problem: Imaml, network: Network, solver: str, iterations: int, setting: Setting
) -> Entry | Absent:
    """Its `root_vjp`, compiled."""
    module = jax_peers.jax_library("JAXopt", setting)
    if isinstance(module, Absent):
        return module
    import jax
    import jax.numpy as jnp

    solve = {"cg": module.linear_solve.solve_cg, "normal_cg": module.linear_solve.solve_normal_cg}

    def objective(params: Any, meta: Any, x: Any, y: Any) -> Any:
        logits = network.jax_logits(params, x)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
        squares = sum(jnp.sum((p - m) ** 2) for p, m in zip(params, meta, strict=True))
        return 0.5 * network.regularisation * squares - jnp.mean(chosen)

    count = len(problem.meta)

    def hypergradient(x: Any, y: Any, *tensors: Any) -> Any:
        params, meta, cotangents = (tensors[i * count : (i + 1) * count] for i in range(3))
        slopes = module.implicit_diff.root_vjp(
            jax.grad(objective),
            params,
            (meta, x, y),
            cotangents,
            solve=lambda matvec, b: solve[solver](matvec, b, maxiter=iterations, tol=0.0),
        )
        return slopes[0]

    arguments: Tensors = (
        problem.x,
        problem.y,
        *problem.solution,
        *problem.meta,
        *problem.cotangents,
    )
    return jax_peers.entry("JAXopt", hypergradient, arguments)
