"""One iMAML hypergradient of a multilayer perceptron, 784-256-10: the backward pass alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import imaml
from bench.case import Case, Problem, Run, Setting, SpeedGoal, Tensors
from bench.imaml import Imaml

WIDTHS = (784, 256, 10)
BATCH = 64
REGULARISATION = 4.0


def network(params: Tensors, x: Tensor) -> Tensor:
    w1, b1, w2, b2 = params
    return F.linear(torch.tanh(F.linear(x, w1, b1)), w2, b2)


def objective(params: Tensors, meta: Tensors, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(network(params, x), y)
    return loss + imaml.penalty(params, meta, REGULARISATION)


def data(device: torch.device) -> Imaml:
    """Random data; the solution by gradient descent, the outer loss on a batch of its own."""
    rng = torch.Generator().manual_seed(0)
    inputs, hidden, classes = WIDTHS
    shapes = ((hidden, inputs), (hidden,), (classes, hidden), (classes,))
    meta = tuple((torch.randn(s, generator=rng) / s[-1] ** 0.5).to(device) for s in shapes)
    x, x_outer = torch.randn(2, BATCH, inputs, generator=rng).to(device)
    y, y_outer = torch.randint(classes, (2, BATCH), generator=rng).to(device)
    solution = imaml.descend(lambda params: objective(params, meta, x, y), meta, 0.1, 100)
    params = tuple(t.detach().requires_grad_() for t in solution)
    outer = F.cross_entropy(network(params, x_outer), y_outer)
    cotangents = torch.autograd.grad(outer, params)
    meta = tuple(t.requires_grad_() for t in meta)
    return Imaml(objective, solution, meta, x, y, cotangents)


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
            return objective(params, meta, x, y)

        def solve(self, x: Tensor, y: Tensor) -> Any:
            for param, found in zip(self.parameters(), problem.solution, strict=True):
                param.copy_(found)
            return self

    adapted = Adapted(*problem.meta).solve(problem.x, problem.y)
    outputs = tuple(adapted.parameters())
    return lambda: torch.autograd.grad(outputs, problem.meta, problem.cotangents)


def build(
    solver: str,
    backward: Callable[[ModuleType, Imaml, Any], Run],
    speedup: float,
    setting: Setting,
) -> Problem:
    problem = data(setting.device)
    widths = "-".join(map(str, WIDTHS))
    return Problem(
        about=f"MLP {widths}, batch {BATCH}, regularisation {REGULARISATION:g}, "
        f"{imaml.ITERATIONS} iterations, float32",
        expected=imaml.expected(problem, solver),
        tolerance=1e-4,
        entries=imaml.entries(problem, solver, backward, peers=["TorchOpt"]),
        goal=SpeedGoal("TorchOpt", speedup),
    )


FORMS = {"root": imaml.root_backward, "module": module_backward}
SPEEDUPS = {"cg": 1.3, "normal_cg": 1.5}
CASES = [
    Case(
        f"hypergradient/{form}-{solver}",
        f"iMAML backward pass, {form} form, {solver}",
        partial(build, solver, backward, SPEEDUPS[solver]),
    )
    for form, backward in FORMS.items()
    for solver in imaml.SOLVERS
]
