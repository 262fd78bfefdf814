"""Hypergradients of 32 sinusoid tasks that share meta-parameters: one batch, or a loop."""

from __future__ import annotations

import itertools
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench import imaml
from bench.case import OURS, Absent, Case, Problem, Run, Setting, SpeedGoal, Tensors
from bench.imaml import Imaml
from bench.libraries import library

WIDTHS = (1, 40, 40, 1)
POINTS = 10
REGULARISATION = 20.0
ITERATIONS = 20
TASKS = (1, 4, 16, 32, 64)
JUDGED = 32
BRIEF = (4, 32)


def network(params: Tensors, x: Tensor) -> Tensor:
    w1, b1, w2, b2, w3, b3 = params
    hidden = torch.relu(x @ w1 + b1)
    return torch.relu(hidden @ w2 + b2) @ w3 + b3


def loss(params: Tensors, x: Tensor, y: Tensor) -> Tensor:
    return (network(params, x) - y).square().mean()


def objective(params: Tensors, meta: Tensors, x: Tensor, y: Tensor) -> Tensor:
    return loss(params, x, y) + imaml.penalty(params, meta, REGULARISATION)


def data(tasks: int, device: torch.device) -> Imaml:
    """MAML's sinusoids (Finn et al. 2017): amplitudes in [0.1, 5], phases in [0, pi]."""
    rng = torch.Generator().manual_seed(0)
    meta: Tensors = ()
    for fan_in, fan_out in itertools.pairwise(WIDTHS):
        weight = (2 * torch.rand(fan_in, fan_out, generator=rng) - 1) / fan_in**0.5
        meta = (*meta, weight.to(device), torch.zeros(fan_out, device=device))
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=rng)
    phase = torch.pi * torch.rand(tasks, 1, 1, generator=rng)
    x, x_outer = 10 * torch.rand(2, tasks, POINTS, 1, generator=rng) - 5
    y, y_outer = amplitude * torch.sin(x - phase), amplitude * torch.sin(x_outer - phase)
    x, y, x_outer, y_outer = (t.to(device) for t in (x, y, x_outer, y_outer))
    start = tuple(t.expand(tasks, *t.shape) for t in meta)
    unsolved = Imaml(objective, start, meta, x, y, cotangents=(), batched=True)
    solution = imaml.descend(lambda params: unsolved.total(params, meta), start, 0.005, 400)
    params = tuple(t.detach().contiguous().requires_grad_() for t in solution)
    outer = torch.vmap(loss)(params, x_outer, y_outer).sum()
    cotangents = torch.autograd.grad(outer, params)
    meta = tuple(t.requires_grad_() for t in meta)
    solution = tuple(t.detach() for t in params)
    return Imaml(objective, solution, meta, x, y, cotangents, batched=True)


def backward(module: ModuleType, problem: Imaml, solve: Any) -> Run:
    one_batch = module is library(OURS)
    return (imaml.root_backward if one_batch else imaml.loop_backward)(module, problem, solve)


def build(tasks: int, setting: Setting) -> Problem:
    problem = data(tasks, setting.device)
    widths = "-".join(map(str, WIDTHS))
    no_batch = "solves no batch, and a loop over tasks is TorchOpt's row"
    return Problem(
        about=f"{tasks} tasks, net {widths}, {POINTS} points each, regularisation "
        f"{REGULARISATION:g}, {ITERATIONS} iterations, float32; TorchOpt: a loop",
        expected=imaml.expected(problem, "cg", ITERATIONS),
        tolerance=1e-4,
        entries=[
            *imaml.entries(problem, "cg", ITERATIONS, backward, peers=["TorchOpt"]),
            Absent("hypertorch", no_batch),
        ],
        goals=[SpeedGoal("TorchOpt", 15.0)] if tasks == JUDGED else [],
    )


CASES = [
    Case(
        f"batched/maml-cg-{tasks}",
        f"iMAML backward pass of a batch of {tasks} tasks, cg",
        partial(build, tasks),
        brief=tasks in BRIEF,
    )
    for tasks in TASKS
]
