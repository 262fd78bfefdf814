"""Train a deep equilibrium model on handwritten digits, with implicit gradients.

The features z of an image solve z = f(z) = relu(GN(conv x) + W * z); a linear layer reads the digit
off them. The forward pass finds z by iteration and stores no iterate: `custom_root` gives z the
gradient of the equation's solution. That takes one linear system an image, (I - df/dz)^T u = dl/dz,
which the Neumann series solves for the whole batch at once, each image with its own stopping test.

    python examples/deq_digits.py [--quick] [--epochs N] [--seed N] [--device D] [--out DIR]

Prints a table, draws DIR/deq_digits.png, and exits with 1 if accuracy or gradient miss their mark.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import rich
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm
from tritonimplicit_kernels import backend

from tritonimplicit import Status, custom_root
from tritonimplicit.linear_solve import solve_inv

SIZE, CLASSES, CHANNELS = 8, 10, 32
CONTRACTION = 0.95  # bound on the Lipschitz constant of f, so that both iterations converge
TOLERANCE = 1e-4  # relative residual, forward and backward, of every image
MAX_ITERATIONS = 300
BATCH, LEARNING_RATE, EPOCHS, QUICK_EPOCHS = 64, 3e-3, 15, 3
MIN_ACCURACY, MIN_COSINE = 0.975, 0.9999

Solved = tuple[Tensor, Tensor]  # iterations and relative residual of each image, both (B,)
FixedPoint = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Solved]]


# -- the equilibrium and its gradient ------------------------------------------------------------


def cell(z: Tensor, injection: Tensor, weight: Tensor) -> Tensor:
    """f: (B, C, 8, 8) -> (B, C, 8, 8)."""
    return torch.relu(injection + F.conv2d(z, weight, padding=1))


def optimality(z: Tensor, injection: Tensor, weight: Tensor) -> Tensor:
    """z - f(z), whose root is the fixed point."""
    return z - cell(z, injection, weight)


def picard(z: Tensor, injection: Tensor, weight: Tensor, tolerance: float) -> tuple[Tensor, Solved]:
    """Iterate z <- f(z); an image whose residual meets the tolerance is left alone."""
    iterations = torch.zeros(len(z), dtype=torch.int32, device=z.device)
    for _ in range(MAX_ITERATIONS):
        update = cell(z, injection, weight)
        residuals = norms(update - z) / norms(update)
        running = ~(residuals <= tolerance)  # NaN keeps running, into the error below
        if not running.any():
            return z, (iterations, residuals.detach())
        z = torch.where(running[:, None, None, None], update, z)
        iterations += running
    raise RuntimeError(f"No fixed point to {tolerance:g} for {int(running.sum())} images.")


def implicit(solve: Callable[[Any, Any], Any]) -> FixedPoint:
    """The fixed point, differentiable in injection and weight by one linear `solve`."""

    @custom_root(optimality, argnums=(1, 2), has_aux=True, solve=solve)
    def fixed_point(z: Tensor, injection: Tensor, weight: Tensor) -> tuple[Tensor, Solved]:
        return picard(z, injection, weight, TOLERANCE)

    return fixed_point


@dataclass
class Log:
    """Iterations and relative residuals of the systems solved, a tensor (B,) for each batch."""

    iterations: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)

    def add(self, iterations: Tensor, residuals: Tensor) -> None:
        self.iterations.append(iterations)
        self.residuals.append(residuals)

    def __str__(self) -> str:
        iterations, worst = torch.cat(self.iterations), torch.cat(self.residuals).max()
        return f"{iterations.median()} (at most {iterations.max()}), to {worst:.1e} at worst"


def neumann(log: Log) -> Callable[[Any, Any], Any]:
    """The Neumann series, a system an image; every one has to converge."""
    solver = solve_inv(ns=True, rtol=TOLERANCE, maxiter=MAX_ITERATIONS, batch_ndim=1)

    def solve(matvec: Any, b: tuple[Tensor]) -> Any:
        solution = solver.solve(matvec, b)
        failed = solution.status[solution.status != Status.CONVERGED]
        if len(failed):
            raise RuntimeError(f"Backward: {len(failed)} systems {Status(int(failed[0])).advice}.")
        log.add(solution.iterations, solution.residual_norm / norms(b[0]))
        return solution.value

    return solve


def norms(batch: Tensor) -> Tensor:
    return torch.linalg.vector_norm(batch, dim=(1, 2, 3))


# -- the model and its training ------------------------------------------------------------------


class DEQ(nn.Module):
    """(B, 1, 8, 8) images -> (B, 10) logits, and how the fixed points were found."""

    def __init__(self, fixed_point: FixedPoint):
        super().__init__()
        self.fixed_point = fixed_point
        self.inject = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1), nn.GroupNorm(4, CHANNELS))
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3) / (9 * CHANNELS) ** 0.5)
        self.head = nn.Sequential(
            nn.AvgPool2d(2),
            nn.GroupNorm(4, CHANNELS),
            nn.Flatten(),
            nn.Linear(CHANNELS * (SIZE // 2) ** 2, CLASSES),
        )
        self.register_buffer("singular", torch.randn(1, CHANNELS, SIZE, SIZE))
        self.power_iteration(20)

    def forward(self, x: Tensor) -> tuple[Tensor, Solved]:
        if self.training:
            self.power_iteration(3)
        injection = self.inject(x)
        z, solved = self.fixed_point(torch.zeros_like(injection), injection, self.contraction())
        return self.head(z), solved

    @torch.no_grad()
    def power_iteration(self, steps: int) -> None:
        """Turn `singular` towards the first right singular vector of z -> W * z."""
        for _ in range(steps):
            image = F.conv2d(self.singular, self.weight, padding=1)
            image = F.conv_transpose2d(image, self.weight, padding=1)
            self.singular = image / image.norm()

    def contraction(self) -> Tensor:
        """W, scaled down where the norm of the operator z -> W * z exceeds the bound."""
        norm = F.conv2d(self.singular, self.weight, padding=1).norm()
        return self.weight * (CONTRACTION / norm.clamp(min=CONTRACTION))


@dataclass
class History:
    """Of each training step the loss, accuracy, seconds; of each epoch the held-out accuracy."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    forward: Log = field(default_factory=Log)
    backward: Log = field(default_factory=Log)


def digits(device: torch.device) -> list[Tensor]:
    """Images and labels for training, then those held out: a fifth of 1,797."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype("float32").reshape(-1, 1, SIZE, SIZE)
    x, x_out, y, y_out = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    return [torch.from_numpy(part).to(device) for part in (x, y, x_out, y_out)]


def train(data: Sequence[Tensor], epochs: int) -> tuple[DEQ, History]:
    x, y, x_out, y_out = data
    history = History()
    model = DEQ(implicit(neumann(history.backward))).to(x.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=epochs * steps, pct_start=0.15
    )
    with tqdm(total=epochs * steps, unit="step") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(x), device="cpu")[: steps * BATCH].split(BATCH):
                start = time.perf_counter()
                train_step(model, optimiser, x[batch], y[batch], history)
                schedule.step()
                history.seconds.append(time.perf_counter() - start)
                bar.update()
            history.held_out.append(accuracy(model, x_out, y_out))
            bar.set_postfix(loss=history.losses[-1], accuracy=f"{history.held_out[-1]:.2%}")
    return model, history


def train_step(
    model: DEQ, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor, history: History
) -> None:
    model.train()
    logits, solved = model(x)
    loss = F.cross_entropy(logits, y)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    history.forward.add(*solved)
    history.losses.append(loss.item())
    history.accuracies.append((logits.argmax(1) == y).float().mean().item())


@torch.no_grad()
def accuracy(model: DEQ, x: Tensor, y: Tensor) -> float:
    model.eval()
    return (model(x)[0].argmax(1) == y).float().mean().item()


# -- what the table and the picture show ---------------------------------------------------------


def gradient(model: DEQ, fixed_point: FixedPoint, x: Tensor, y: Tensor) -> Tensor:
    """All parameters' gradient, by another way through the fixed point."""
    model = copy.deepcopy(model).to(x.dtype).eval()
    model.fixed_point = fixed_point
    F.cross_entropy(model(x)[0], y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient_cosine(model: DEQ, x: Tensor, y: Tensor) -> float:
    """Implicit gradient against autograd through all iterations, up to 1e-13, in float64."""
    by_equation = gradient(model, implicit(neumann(Log())), x.double(), y)
    unrolled = gradient(model, lambda *args: picard(*args, tolerance=1e-13), x.double(), y)
    return F.cosine_similarity(by_equation, unrolled, dim=0).item()


def backward_residuals(model: DEQ, x: Tensor, y: Tensor, iterations: int) -> Tensor:
    """(iterations + 1, B): each image's true relative residual after k iterations."""
    residuals: list[Tensor] = []

    def solve(matvec: Any, b: tuple[Tensor]) -> Any:
        for k in range(iterations + 1):
            solution = solve_inv(ns=True, maxiter=k, batch_ndim=1).solve(matvec, b)
            residuals.append(solution.residual_norm / norms(b[0]))
        return solution.value

    gradient(model, implicit(solve), x, y)
    return torch.stack(residuals).cpu()


def draw(history: History, residuals: Tensor, path: Path) -> None:
    """Loss, accuracy, and the backward residuals by iteration."""
    epochs, steps = len(history.held_out), len(history.losses)
    per_epoch = [range(k, k + steps // epochs) for k in range(0, steps, steps // epochs)]
    ends = range(1, epochs + 1)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    left.semilogy([k * epochs / steps for k in range(steps)], history.losses, "C0", alpha=0.3)
    left.semilogy(ends, [fmean(history.losses[k] for k in ks) for ks in per_epoch], "C0")
    left.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    left.legend(["each step", "mean of the epoch"])

    training = [100 * fmean(history.accuracies[k] for k in ks) for ks in per_epoch]
    middle.plot(ends, training, "C0", label="training (mean of the epoch)")
    middle.plot(ends, [100 * a for a in history.held_out], "C1", label="held out")
    middle.set(title="Accuracy", xlabel="epoch", ylabel="correct (%)")
    middle.legend()

    right.semilogy(residuals, "0.75", linewidth=0.6)
    right.semilogy(residuals.max(1).values, "C3", label="the slowest of them")
    right.semilogy(residuals.median(1).values, "C0", label=f"median of {residuals.shape[1]} images")
    right.axhline(TOLERANCE, color="k", linestyle=":", label="training stops here")
    right.set(title="Backward solve", xlabel="iterations", ylabel="relative residual")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


@dataclass
class Result:
    """What a run is judged by, and the rows of its table."""

    accuracy: float
    cosine: float
    rows: dict[str, str]

    def shortfalls(self, trained_fully: bool) -> list[str]:
        found = []
        if trained_fully and not self.accuracy >= MIN_ACCURACY:
            found.append(f"held-out accuracy {self.accuracy:.2%} is below {MIN_ACCURACY:.1%}")
        if not self.cosine >= MIN_COSINE:
            found.append(f"gradient cosine {self.cosine:.6f} is below {MIN_COSINE}")
        return found


def run(epochs: int, seed: int, device: torch.device, out: Path) -> Result:
    torch.manual_seed(seed)
    # The ten bits of TF32, which convolutions have by default on a GPU, cannot meet the tolerance.
    torch.backends.cudnn.allow_tf32 = False
    data = digits(device)
    model, history = train(data, epochs)
    x_out, y_out = data[2:]
    cosine = gradient_cosine(model, x_out[:16], y_out[:16])
    picture = out / "deq_digits.png"
    draw(history, backward_residuals(model, x_out[:BATCH], y_out[:BATCH], 25), picture)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rows = {
        "held-out accuracy": f"{history.held_out[-1]:.2%} of {len(x_out)} images, seed {seed}",
        "forward iterations": str(history.forward),
        "backward iterations": str(history.backward),
        "cosine with unrolling": f"{cosine:.10f} (float64, all parameters)",
        "time of a step": f"{1e3 * median(history.seconds):.0f} ms (median)",
        "device": f"{name}, {torch.get_num_threads()} CPU threads",
        "vector work by": backend("auto", device, torch.float32).name.split(".")[-1],
        "picture": str(picture),
    }
    return Result(history.held_out[-1], cosine, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs")
    parser.add_argument("--epochs", type=int, help=f"default {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the picture")
    given = parser.parse_args(arguments)
    epochs = given.epochs or (QUICK_EPOCHS if given.quick else EPOCHS)
    on_gpu = torch.cuda.is_available()
    device = ("cuda" if on_gpu else "cpu") if given.device == "auto" else given.device
    result = run(epochs, given.seed, torch.device(device), given.out)
    table = Table("deep equilibrium model", "digits", show_lines=False)
    for row in result.rows.items():
        table.add_row(*row)
    rich.print(table)
    shortfalls = result.shortfalls(trained_fully=epochs >= EPOCHS)
    for shortfall in shortfalls:
        print(f"deq_digits: {shortfall}", file=sys.stderr)
    return 1 if shortfalls else 0


if __name__ == "__main__":
    sys.exit(main())
