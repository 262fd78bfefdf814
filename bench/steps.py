"""One CG iteration without its matvec: the masked kernels beside five lines of torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from bench.case import OURS, PLAIN, Case, Entry, Problem, Run, Setting, SpeedGoal, Tensors
from tritonimplicit_kernels.bench.cases import BY_NAME, Size
from tritonimplicit_kernels.bench.clock import Prepare
from tritonimplicit_kernels.bench.trial import Trial

SIZES = {"1e7": (1, 10_000_000), "1e5": (1, 100_000), "64x1e4": (64, 10_000)}
QUICK_ELEMENTS = 1_000_000


def in_a_row(prepares: Sequence[Prepare]) -> Prepare:
    """One run after the other; the answer is the last one's x, r and p, without the sums."""

    def prepare() -> Run:
        runs = [prepare() for prepare in prepares]

        def run() -> Tensors:
            x, r, p, _ = [run() for run in runs][-1]
            return x.view(-1), r.view(-1), p.view(-1)

        return run

    return prepare


def build(systems: int, n: int, setting: Setting) -> Problem:
    n = min(n, QUICK_ELEMENTS) if setting.quick else n
    repeats = 10 if setting.device.type == "cuda" else 1  # a single launch would time the host
    case, size = BY_NAME["cg"], Size(systems, n)
    trials = [Trial(case, size, torch.float32, setting.device) for _ in range(repeats)]
    return Problem(
        about=f"B = {systems}, n = {n:,}, float32",
        expected=trials[0].expected[:3],
        tolerance=trials[0].tolerance,
        entries=[
            Entry(OURS, in_a_row([trial.ours for trial in trials])),
            Entry(PLAIN, in_a_row([trial.unfused for trial in trials])),
        ],
        repeats=repeats,
        goals=[SpeedGoal(PLAIN, 4.0)] if n == 10_000_000 else [],
    )


CASES = [
    Case(f"steps/cg-{name}", f"one CG iteration without its matvec, {name}", partial(build, *size))
    for name, size in SIZES.items()
]
