"""Learn to learn sinusoids from ten points each: implicit MAML, all tasks of a step as one batch.

A task is a sinusoid of some amplitude and phase. Adaptation minimises the error on the task's ten
points plus a penalty on the distance from meta-parameters that all tasks share; these are trained
so that, once adapted, the network is right elsewhere on the task's curve. `custom_root` knows the
adapted parameters as a root of the inner gradient, so the inner solver is free: here it is that of
Levenberg and Marquardt, and no step of it is differentiated. vmap over the tasks makes their inner
solves one batch, and their linear systems in the backward pass another, each with its own stop.

    python examples/imaml_sinusoid.py [--quick] [--steps N] [--seed N] [--device D] [--out DIR]

Prints a table, draws DIR/imaml_sinusoid.png, and exits with 1 if adaptation helps too little.

Finn, Abbeel and Levine, "Model-agnostic meta-learning", ICML 2017 (the tasks); Rajeswaran, Finn,
Kakade and Levine, "Meta-learning with implicit gradients", NeurIPS 2019.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import rich
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from tqdm import trange

from tritonimplicit import Status, custom_root, record_solves
from tritonimplicit.linear_solve import solve_minres

POINTS, TASKS, HELD_OUT = 10, 32, 200  # points that a task shows; tasks a step; tasks to judge by
PENALTY = 0.1
INNER_STEPS, STEPS, QUICK_STEPS, LEARNING_RATE = 10, 200, 30, 5e-3
# Symmetric, but not positive definite where an inner solve has not come all the way to a minimum.
BACKWARD = solve_minres(rtol=1e-3, maxiter=40)
MAX_RATIO = 0.2  # of the losses after and before adaptation


class Network(nn.Module):
    """(n, 1) -> (n, 1), with its parameters as one vector, as the inner solver wants them."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh()]
        self.layers = nn.Sequential(*hidden, nn.Linear(40, 1))

    def flat(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.parameters())

    def at(self, params: Tensor, x: Tensor) -> Tensor:
        """The network with the parameters `params` (p,)."""
        named = dict(self.named_parameters())
        pieces = params.split([p.numel() for p in named.values()])
        shaped = [piece.view(p.shape) for piece, p in zip(pieces, named.values(), strict=True)]
        return functional_call(self, dict(zip(named, shaped, strict=True)), (x,))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tasks(NamedTuple):
    """Points to adapt to, and others to be judged by; each (tasks, points, 1)."""

    x: Tensor
    y: Tensor
    x_out: Tensor
    y_out: Tensor


def draw_tasks(tasks: int, judged: int, device: torch.device) -> Tasks:
    """Amplitudes in [0.1, 5], phases in [0, pi], x in [-5, 5]."""
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1)
    phase = torch.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, POINTS + judged, 1) - 5
    y = amplitude * torch.sin(x - phase)
    x, y = x.to(device), y.to(device)
    return Tasks(x[:, :POINTS], y[:, :POINTS], x[:, POINTS:], y[:, POINTS:])


# -- one task: the inner problem and its solver --------------------------------------------------


class Adaptation:
    """(meta-parameters (p,), x (n, 1), y (n, 1)) -> adapted parameters (p,), differentiable."""

    def __init__(self, network: Network, inner_steps: int = INNER_STEPS):
        self.network, self.inner_steps = network, inner_steps
        self.root = custom_root(grad(self.objective), argnums=1, solve=BACKWARD)(self.solve)

    def __call__(self, meta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.root(meta, meta, x, y)

    def loss(self, params: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (self.network.at(params, x) - y).square().mean()

    def objective(self, params: Tensor, meta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(params, x, y) + PENALTY / 2 * (params - meta).square().sum()

    def solve(self, params: Tensor, meta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Levenberg-Marquardt from `params`; a step that would not descend is not taken."""
        damping, value = x.new_tensor(0.1), self.objective(params, meta, x, y)
        for _ in range(self.inner_steps):
            tried = params + self.step(params, meta, x, y, damping)
            value_there = self.objective(tried, meta, x, y)
            better = value_there < value
            params = torch.where(better, tried, params)
            value = torch.where(better, value_there, value)
            damping = torch.where(better, damping / 5, damping * 4)
        return params

    def step(self, params: Tensor, meta: Tensor, x: Tensor, y: Tensor, damping: Tensor) -> Tensor:
        """-(J^T J + c I)^-1 gradient, by a system of the size of the data, n, in place of p."""
        weight = (2 / len(x)) ** 0.5
        jacobian = weight * jacrev(self.network.at)(params, x)[:, 0]  # (n, p)
        gradient = grad(self.objective)(params, meta, x, y)
        c = PENALTY + damping
        gram = jacobian @ jacobian.T + c * torch.eye(len(x), dtype=x.dtype, device=x.device)
        return (jacobian.T @ torch.linalg.solve(gram, jacobian @ gradient) - gradient) / c


# -- many tasks ----------------------------------------------------------------------------------


class Meta:
    """Meta-parameters and their training."""

    def __init__(self, device: torch.device):
        self.network = Network().to(device)
        adaptation = Adaptation(self.network)
        self.adapt = vmap(adaptation, in_dims=(None, 0, 0))
        self.loss = vmap(adaptation.loss)
        self.slope = vmap(grad(adaptation.objective), in_dims=(0, None, 0, 0))
        self.parameters = self.network.flat().detach().requires_grad_()
        self.optimiser = torch.optim.Adam([self.parameters], lr=LEARNING_RATE)

    def step(self, tasks: Tasks) -> tuple[float, Tensor]:
        """One step of Adam; the loss after adaptation, and each linear system's status."""
        loss = self.loss(self.adapt(self.parameters, tasks.x, tasks.y), tasks.x_out, tasks.y_out)
        self.optimiser.zero_grad()
        with record_solves() as log:
            loss.mean().backward()
        nn.utils.clip_grad_norm_([self.parameters], 10.0)
        self.optimiser.step()
        return loss.mean().item(), log[0].status

    @torch.no_grad()
    def judge(self, tasks: Tasks) -> tuple[Tensor, Tensor, Tensor]:
        """For each task: loss before and after, and what adaptation left of the inner gradient."""
        meta = self.parameters.expand(len(tasks.x), -1)
        adapted = self.adapt(self.parameters, tasks.x, tasks.y)
        before, after = (self.loss(p, tasks.x_out, tasks.y_out) for p in (meta, adapted))
        left, whole = (
            self.slope(p, self.parameters, tasks.x, tasks.y).norm(dim=1) for p in (adapted, meta)
        )
        return before, after, left / whole


def draw(meta: Meta, losses: list[float], tasks: Tasks, path: Path) -> None:
    """Draw the loss of meta-training, and two held-out tasks before and after adaptation."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    first, *panels = figure.subplots(1, 3)
    window = min(10, len(losses))
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
    first.semilogy(range(1, len(losses) + 1), losses, "C0", alpha=0.3, label="each step")
    first.semilogy(range(window, len(losses) + 1), smooth, "C0", label=f"mean of {window}")
    first.set(title="Meta-training", xlabel="step", ylabel="loss after adaptation")
    adapted = meta.adapt(meta.parameters, tasks.x, tasks.y).detach()
    for task, panel in enumerate(panels):
        order = tasks.x_out[task, :, 0].argsort()
        x = tasks.x_out[task, order]
        panel.plot(x.cpu(), tasks.y_out[task, order].cpu(), "0.6", linewidth=4, label="the task")
        for params, style, name in (
            (meta.parameters.detach(), "C1--", "before adaptation"),
            (adapted[task], "C0", "after"),
        ):
            panel.plot(x.cpu(), meta.network.at(params, x).detach().cpu(), style, label=name)
        panel.plot(tasks.x[task].cpu(), tasks.y[task].cpu(), "ko", label=f"its {POINTS} points")
        panel.set(title=f"Held-out task {task + 1}", xlabel="x", ylabel="y")
    first.legend(frameon=False)
    panels[0].legend(frameon=False, fontsize="small")
    for panel in (first, *panels):
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def run(steps: int, seed: int, device: torch.device, out: Path) -> tuple[float, float]:
    """Train, judge, report; returns the mean held-out loss before and after adaptation."""
    torch.manual_seed(seed)
    held_out = draw_tasks(HELD_OUT, 100, device)
    meta, losses, statuses = Meta(device), [], []
    untrained = meta.judge(held_out)[1].mean()
    start = time.perf_counter()
    for _ in (bar := trange(steps, unit="step")):
        loss, status = meta.step(draw_tasks(TASKS, POINTS, device))
        losses.append(loss)
        statuses.append(status)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    seconds = time.perf_counter() - start
    before, after, left = meta.judge(held_out)
    picture = out / "imaml_sinusoid.png"
    draw(meta, losses, held_out, picture)

    counts = torch.cat(statuses).bincount().tolist()
    solved = ", ".join(f"{n} {Status(code).name}" for code, n in enumerate(counts) if n)
    table = Table("Implicit MAML", f"sinusoids, seed {seed}, {steps} steps of {TASKS} tasks")
    table.add_row("loss before adaptation", f"{before.mean():.3f} (mean of {HELD_OUT} tasks)")
    table.add_row("loss after", f"{after.mean():.3f}; before meta-training {untrained:.3f}")
    table.add_row("inner gradient left", f"{left.median():.1e} (median), {left.max():.1e} (worst)")
    table.add_row("linear systems", solved)
    table.add_row("meta-training", f"{seconds:.0f} s on {device.type}")
    table.add_row("picture", str(picture))
    rich.print(table)
    return before.mean().item(), after.mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Implicit MAML on sinusoids.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", dest="steps", action="store_const", const=QUICK_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=auto)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args(arguments)
    # Threads wait for each other at each of many small operations: long, where cores are shared.
    torch.set_num_threads(1)
    before, after = run(options.steps, options.seed, options.device, options.out)
    if options.steps >= STEPS and not after <= MAX_RATIO * before:
        print(f"imaml_sinusoid: from {before:.3f} to {after:.3f} is too little", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
