"""One CG iteration without its matvec: the masked kernels beside five lines of torch."""

from __future__ import annotations

from functools import partial

import torch

from bench.case import OURS, PLAIN, Case, Entry, Problem, Run, Setting, SpeedGoal, Tensors
from tritonimplicit_kernels.bench.cases import BY_NAME, Size
from tritonimplicit_kernels.bench.clock import Prepare
from tritonimplicit_kernels.bench.trial import Trial

SIZES = {"1e7": (1, 10_000_000), "1e5": (1, 100_000), "64x1e4": (64, 10_000)}
QUICK_ELEMENTS = 1_000_000


def vectors_of(prepare: Prepare) -> Prepare:
    """The same, with x, r and p as the answer, without the sums."""

    def prepared() -> Run:
        run = prepare()

        def answer() -> Tensors:
            x, r, p, _ = run()
            return x.view(-1), r.view(-1), p.view(-1)

        return answer

    return prepared


def build(systems: int, n: int, setting: Setting) -> Problem:
    n = min(n, QUICK_ELEMENTS) if setting.quick else n
    trial = Trial(BY_NAME["cg"], Size(systems, n), torch.float32, setting.device)
    return Problem(
        about=f"B = {systems}, n = {n:,}, float32",
        expected=trial.expected[:3],
        tolerance=trial.tolerance,
        entries=[Entry(OURS, vectors_of(trial.ours)), Entry(PLAIN, vectors_of(trial.unfused))],
        goal=SpeedGoal(PLAIN, 4.0) if n == 10_000_000 else None,
    )


CASES = [
    Case(f"steps/cg-{name}", f"one CG iteration without its matvec, {name}", partial(build, *size))
    for name, size in SIZES.items()
]
