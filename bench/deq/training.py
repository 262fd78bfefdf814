"""Training the byte language model on, by one library and by the other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import tritonimplicit.nn as ti_nn
from bench.case import (
    OURS,
    Absent,
    Case,
    Entry,
    Figures,
    Problem,
    Run,
    Setting,
    SpeedGoal,
    Tensors,
)
from bench.libraries import library
from bench.models import Model, load, text
from bench.models.language import CONTEXT
from tritonimplicit.fixed_point import Anderson
from tritonimplicit.linear_solve import GMRES

Solve = Callable[[Model, Tensor], Tensor]
"""The fixed point of a model's cell for x, with a gradient."""

LEARNING_RATE = 0.1
RIGHT = 0.5
"""An update is right whose distance from the exact one is at most half of that one's length."""
TORCHDEQ: dict[str, dict[str, object]] = {
    "default": {},
    "ift=True": {"ift": True},
    "ift=True, Anderson": {"ift": True, "f_solver": "anderson"},
    "ift=True, Broyden": {"ift": True, "f_solver": "broyden", "b_solver": "broyden"},
}


def ours(**settings: object) -> Solve:
    def solve(model: Model, x: Tensor) -> Tensor:
        deq = ti_nn.DEQ(model.cell, **settings)  # type: ignore[arg-type]
        z: Tensor = deq(*model.inputs(x), z0=model.start(x))
        return z

    return solve


def exactly(on_failure: str = "raise") -> Solve:
    """To nine digits."""
    return ours(
        solver=Anderson(rtol=1e-9, maxiter=500, batch_ndim=1, on_failure=on_failure),
        gradient=ti_nn.Implicit(GMRES(rtol=1e-9, maxiter=500, batch_ndim=1)),
    )


def torchdeq(label: str) -> Solve | Absent:
    module = library("torchdeq")
    if isinstance(module, Absent):
        return Absent(f"torchdeq, {label}", module.reason)
    deq = module.get_deq(**TORCHDEQ[label])

    def solve(model: Model, x: Tensor) -> Tensor:
        inputs = model.inputs(x)
        found, _ = deq(lambda z: model.cell(z, *inputs), model.start(x))
        last: Tensor = found[-1]
        return last

    return solve


def trained_on(model: Model, solve: Solve, batches: list[tuple[Tensor, Tensor]]) -> Tensors:
    """The parameters after a step of gradient descent for each batch.

    Adam's steps would hide how long a gradient is.
    """
    optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for x, y in batches:
        loss = model.loss(solve(model, x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return tuple(p.detach() for p in model.parameters())


def flat(parameters: Tensors) -> Tensor:
    """All of them in one vector, float64."""
    return nn.utils.parameters_to_vector(parameters).detach().double()


def build(setting: Setting) -> Problem:
    steps, size = (2, 4) if setting.quick else (5, 16)
    model = load("lm", setting.device)

    def on_device(seed: int, count: int, held_out: bool) -> list[tuple[Tensor, Tensor]]:
        pairs = text.batches(count, size, CONTEXT, seed, held_out)
        return [(x.to(setting.device), y.to(setting.device)) for x, y in pairs]

    batches, held_out = on_device(11, steps, False), on_device(12, 2 if setting.quick else 5, True)

    def bits(parameters: Tensors) -> float:
        judge = copy.deepcopy(model).double()
        nn.utils.vector_to_parameters(flat(parameters), judge.parameters())
        with torch.no_grad():  # a model that was ruined has NaN bits
            losses = [judge.loss(exactly("ignore")(judge, x), y) for x, y in held_out]
        return torch.stack(losses).mean().item() / math.log(2)

    before = flat(tuple(model.parameters()))
    exact = trained_on(copy.deepcopy(model).double(), exactly(), batches)
    update = flat(exact) - before

    def error(answer: Tensors) -> float:
        return float((flat(answer) - before - update).norm() / update.norm())

    def figures(answer: Tensors) -> Figures:
        return {"bits a byte": bits(answer)}

    def entry(name: str, solve: Solve) -> Entry:
        def prepare() -> Run:
            student = copy.deepcopy(model).train()
            return lambda: trained_on(student, solve, batches)

        return Entry(name, prepare, figures=figures)

    entries: list[Entry | Absent] = [entry(OURS, ours())]
    for label in TORCHDEQ:
        solve = torchdeq(label)
        entries.append(solve if isinstance(solve, Absent) else entry(f"torchdeq, {label}", solve))
    # Its default solvers and tolerances; without ift=True its gradient is one step's, not exact.
    goals = [SpeedGoal("torchdeq, ift=True", 1.8)]
    return Problem(
        about=f"{steps} steps of gradient descent from the trained weights, {size} x {CONTEXT} "
        "bytes each, float32; times are of a step, forwards and backwards; bits a byte of "
        "held-out text",
        expected=(),
        tolerance=RIGHT,
        entries=entries,
        repeats=steps,
        goals=[] if setting.quick else goals,
        compares="same steps",
        error=error,
        error_is="of all steps' update of the parameters, relative to that by exact gradients in "
        f"float64, which ends at {bits(exact):.3f} bits a byte",
    )


CASES = [Case("deq/training-lm", "training steps of the byte language model", build)]
