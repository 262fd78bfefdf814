"""Peak memory of a DEQ's training step by the number of forward iterations, and its picture.

python -m bench run memory-deq
python -m bench.deq_memory FILE [--out docs/images/deq_memory.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import OURS, PLAIN, Case, Entry, Problem, Run, Setting, Tensors
from bench.results import Report
from tritonimplicit.fixed_point import Anderson, FixedPointSolver, Picard
from tritonimplicit.linear_solve import GMRES, LinearSolver, Neumann
from tritonimplicit.nn import DEQ, Implicit

FAMILY = "memory-deq"
ITERATIONS = (5, 10, 20, 40, 80)
CONTRACTION = 0.5
LEAN = f"{OURS}, Picard and Neumann"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "deq_memory.png"


def layer(z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """(B, C, H, W) images."""
    return CONTRACTION * torch.tanh(F.conv2d(z, weight, padding=1)) + x


def data(setting: Setting, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and a weight that makes the layer a contraction, by CONTRACTION or better."""
    batch, channels, size = (4, 8, 16) if setting.quick else (8, 16, 32)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=rng)
    weight = torch.randn(channels, channels, 3, 3, generator=rng)
    # A convolution's norm is at most the sum of those of its 9 matrices.
    weight /= torch.linalg.matrix_norm(weight.flatten(2).permute(2, 0, 1), 2).sum()
    on_device = [t.to(setting.device, dtype) for t in (x, weight)]
    return on_device[0], on_device[1].requires_grad_()


def gradient(z: Tensor, weight: Tensor) -> Tensors:
    return torch.autograd.grad(z.square().mean(), weight)


def unrolled(x: Tensor, weight: Tensor, iterations: int) -> Tensors:
    z = torch.zeros_like(x)
    for _ in range(iterations):
        z = layer(z, x, weight)
    return gradient(z, weight)


def implicit(x: Tensor, weight: Tensor, solver: FixedPointSolver, linear: LinearSolver) -> Tensors:
    deq = DEQ(layer, solver=solver, gradient=Implicit(linear))
    return gradient(deq(x, weight), weight)


def build(iterations: int, setting: Setting) -> Problem:
    x, weight = data(setting, torch.float32)
    # All iterations are done: nobody asks whether fewer are enough.
    anderson = Anderson(rtol=0.0, maxiter=iterations, batch_ndim=1, check_every=0)
    picard = Picard(rtol=0.0, maxiter=iterations, batch_ndim=1, check_every=0)
    ways: dict[str, Callable[[], Tensors]] = {
        OURS: partial(implicit, x, weight, anderson, GMRES(rtol=1e-5, batch_ndim=1)),
        LEAN: partial(implicit, x, weight, picard, Neumann(rtol=1e-5, maxiter=100, batch_ndim=1)),
        PLAIN: partial(unrolled, x, weight, iterations),
    }

    def entry(name: str, way: Run) -> Entry:
        return Entry(name, lambda: way)

    return Problem(
        about=f"a step of a convolutional DEQ, {tuple(x.shape)}, {iterations} forward iterations",
        expected=unrolled(*data(setting, torch.float64), iterations=60),
        # Of k iterations from zero, z and the series of its gradient lack terms of c^k and k c^k.
        tolerance=2 * (iterations + 1) * CONTRACTION**iterations + 1e-4,
        entries=[entry(name, way) for name, way in ways.items()],
    )


CASES = [
    Case(f"{FAMILY}/{k}", f"peak memory of a DEQ's step, {k} forward iterations", partial(build, k))
    for k in ITERATIONS
]


def draw(report: Report, path: Path) -> None:
    """Draw the peaks of each provider by the number of forward iterations."""
    from matplotlib.figure import Figure  # of the extra `bench`

    cases = [case for case in report.cases if case.name.startswith(f"{FAMILY}/")]
    labels = {
        PLAIN: "autograd through the iterations",
        OURS: "implicit: Anderson(5), GMRES(20)",
        LEAN: "implicit: Picard, Neumann",
    }
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    panel = figure.subplots()
    for colour, (provider, label) in zip(("C3", "C0", "C2"), labels.items(), strict=True):
        points = [
            (int(case.name.split("/")[1]), row.peak)
            for case in cases
            for row in case.rows
            if row.provider == provider and row.peak is not None
        ]
        panel.plot(*zip(*sorted(points), strict=True), f"{colour}o-", label=label)
    panel.set(xlabel="forward iterations", ylabel="peak memory of a step (MiB)", ylim=(0, None))
    panel.set_title(f"{cases[0].about.rsplit(',', 1)[0]}, float32", fontsize=9)
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the memory of a DEQ's training step.")
    parser.add_argument("file", type=Path, help="results of `bench run memory-deq`")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args(argv)
    report = Report.load(options.file)
    if not any(case.name.startswith(f"{FAMILY}/") for case in report.cases):
        parser.error(f"{options.file} has no case of {FAMILY}")
    draw(report, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
