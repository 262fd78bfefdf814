"""Train the models: python -m bench.models.train [NAME...]. Minutes; needs scikit-learn."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.models import images, text
from bench.models.base import MODELS, Model, load, save
from bench.models.language import CONTEXT
from tritonimplicit.fixed_point import Anderson, FixedPointSolver
from tritonimplicit.linear_solve import LinearSolver, solve_gmres
from tritonimplicit.nn import DEQ, Implicit

Batches = Iterator[tuple[Tensor, Tensor]]

EPOCHS, DIGITS_BATCH = 15, 64
LM_STEPS, LM_BATCH, WARM_UP = 700, 16, 40
LEARNING_RATE = 3e-3


def fit(
    model: Model,
    batches: Batches,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    forward: FixedPointSolver,
    backward: LinearSolver,
) -> None:
    """One step of optimiser and schedule a batch, with implicit gradients."""
    deq = DEQ(model.cell, solver=forward, gradient=Implicit(backward))
    began = time.perf_counter()
    for step, (x, y) in enumerate(batches):
        model.normalise(3)
        loss = model.loss(deq(*model.inputs(x), z0=model.start(x)), y)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.perf_counter() - began
            solves = [solve for solve in (deq.last.forward, deq.last.backward) if solve]
            iterations = [int(solve.iterations.max()) for solve in solves]
            line = f"{model.name} {step}: {loss.item():.3f} {iterations} {seconds:.0f} s"
            print(line, flush=True)


def train_digits(model: Model) -> None:
    """AdamW, one cycle, images shifted by up to a pixel; prints the held-out accuracy."""
    x, y, x_out, y_out = images.digits()
    images.save_sample(x_out, y_out)
    steps = len(x) // DIGITS_BATCH

    def batches() -> Batches:
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(x))[: steps * DIGITS_BATCH].split(DIGITS_BATCH):
                yield shifted(x[batch]), y[batch]

    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=EPOCHS * steps, pct_start=0.15
    )
    model.normalise(20)
    solvers = Anderson(rtol=1e-4, batch_ndim=1), solve_gmres(rtol=1e-4, batch_ndim=1)
    fit(model, batches(), optimiser, schedule, *solvers)
    model.normalise(100)
    save(model)
    model = load(model.name, x.device)
    z = Anderson(rtol=1e-4, batch_ndim=1)(closed(model, x_out), model.start(x_out))
    print(f"{model.name}: {(model.logits(z).argmax(-1) == y_out).float().mean():.2%} held out")


def train_language(model: Model) -> None:
    """AdamW, warm-up, cosine; prints the bits a byte of held-out text."""

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / LM_STEPS, 1)))
        return min((step + 1) / WARM_UP, 1) * (0.1 + 0.9 * cosine)

    optimiser = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    batches = iter(text.batches(LM_STEPS, LM_BATCH, CONTEXT, seed=0))
    forward = Anderson(rtol=1e-3, maxiter=30, batch_ndim=1)
    backward = solve_gmres(rtol=1e-2, maxiter=30, batch_ndim=1)
    fit(model, batches, optimiser, schedule, forward, backward)
    save(model)
    print(f"{model.name}: {bits_per_byte(load(model.name, torch.device('cpu'))):.3f} held out")


@torch.no_grad()
def bits_per_byte(model: Model, count: int = 10) -> float:
    """Of held-out text."""
    solver, losses = Anderson(rtol=1e-3, batch_ndim=1, on_failure="ignore"), []
    for x, y in text.batches(count, LM_BATCH, CONTEXT, seed=123, held_out=True):
        losses.append(model.loss(solver(closed(model, x), model.start(x)), y))
    return torch.stack(losses).mean().item() / math.log(2)


def shifted(x: Tensor) -> Tensor:
    """Each image moved by up to one pixel, at random."""
    windows = nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    row, column = torch.randint(3, (2, len(x)))
    return windows[torch.arange(len(x)), :, row, column]


@torch.no_grad()
def closed(model: Model, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The cell, of z alone."""
    inputs = model.inputs(x)
    return lambda z: model.cell(z, *inputs)


TRAINING = {"conv": train_digits, "multiscale": train_digits, "lm": train_language}


def main(names: list[str]) -> None:
    for name in names or list(MODELS):
        torch.manual_seed(0)
        TRAINING[name](MODELS[name]().train())


if __name__ == "__main__":
    main(sys.argv[1:])
