"""One iMAML hypergradient of a small network: the backward pass alone."""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import imaml, imaml_peers
from bench.case import Absent, Case, Entry, Problem, Run, Setting, SpeedGoal, Tensors
from bench.imaml import Imaml
from bench.networks import NETWORKS, Network

ITERATIONS = (5, 20)
SPEEDUPS = {"cg": 1.3, "normal_cg": 1.5}
"""Of the MLP, against TorchOpt, 20 iterations."""


def objective(network: Network, params: Tensors, meta: Tensors, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(network.torch_logits(params, x), y)
    return loss + imaml.penalty(params, meta, network.regularisation)


def data(network: Network, device: torch.device) -> Imaml:
    """Random data; the solution by gradient descent, the outer loss on a batch of its own."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(shape, math.prod(shape[1:] or shape)) for shape in network.shapes]
    meta = tuple((torch.randn(s, generator=rng) / fan_in**0.5).to(device) for s, fan_in in shapes)
    x, x_outer = torch.randn(2, network.batch, *network.inputs, generator=rng).to(device)
    y, y_outer = torch.randint(network.classes, (2, network.batch), generator=rng).to(device)
    inner = partial(objective, network)
    solution = imaml.descend(lambda params: inner(params, meta, x, y), meta, 0.1, 100)
    params = tuple(t.detach().requires_grad_() for t in solution)
    outer = F.cross_entropy(network.torch_logits(params, x_outer), y_outer)
    cotangents = torch.autograd.grad(outer, params)
    meta = tuple(t.requires_grad_() for t in meta)
    return Imaml(inner, tuple(t.detach() for t in solution), meta, x, y, cotangents)


def module_backward(module: ModuleType, problem: Imaml, solve: Any) -> Run:
    """The backward pass of the module form."""

    class Adapted(module.nn.ImplicitMetaGradientModule, linear_solve=solve):  # type: ignore[call-arg,misc,name-defined]
        def __init__(self, *meta: Tensor):
            super().__init__()
            for i, tensor in enumerate(meta):
                setattr(self, f"meta_{i}", tensor)
                setattr(self, f"param_{i}", nn.Parameter(tensor.detach().clone()))

        def objective(self, x: Tensor, y: Tensor) -> Tensor:
            params, meta = tuple(self.parameters()), tuple(self.meta_parameters())
            return problem.objective(params, meta, x, y)

        def solve(self, x: Tensor, y: Tensor) -> Any:
            for param, found in zip(self.parameters(), problem.solution, strict=True):
                param.copy_(found)
            return self

    adapted = Adapted(*problem.meta).solve(problem.x, problem.y)
    outputs = tuple(adapted.parameters())
    return lambda: torch.autograd.grad(outputs, problem.meta, problem.cotangents)


def build(name: str, form: str, solver: str, iterations: int, setting: Setting) -> Problem:
    network = NETWORKS[name]
    problem = data(network, setting.device)
    entries: list[Entry | Absent]
    if form == "module":
        entries = imaml.entries(problem, solver, iterations, module_backward, peers=["TorchOpt"])
    else:
        entries = imaml.entries(
            problem, solver, iterations, imaml.root_backward, peers=["TorchOpt"]
        )
        entries.append(imaml_peers.hypertorch(problem, solver, iterations))
        entries.append(imaml_peers.jaxopt(problem, network, solver, iterations, setting))
    judged = name == "mlp" and iterations == 20
    return Problem(
        about=f"{network.about}, regularisation {network.regularisation:g}, "
        f"{iterations} iterations, float32",
        expected=imaml.expected(problem, solver, iterations),
        tolerance=1e-4,
        entries=entries,
        goals=[SpeedGoal("TorchOpt", SPEEDUPS[solver])] if judged else [],
        product=problem.product,
    )


def _case(name: str, form: str, solver: str, iterations: int) -> Case:
    label = name if form == "root" else f"{name}-{form}"
    return Case(
        f"hypergradient/{label}-{solver}-{iterations}",
        f"iMAML backward pass, {name}, {form} form, {solver}, {iterations} iterations",
        partial(build, name, form, solver, iterations),
        brief=iterations == 20,
    )


CASES = [
    *(
        _case(name, "root", solver, iterations)
        for name in NETWORKS
        for solver in imaml.SOLVERS
        for iterations in ITERATIONS
    ),
    *(_case("mlp", "module", solver, 20) for solver in imaml.SOLVERS),
]
