"""One CG iteration without its matvec: the masked kernels beside five lines of torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from bench import textbook
from bench.case import OURS, PLAIN, Case, Entry, Problem, Run, Setting, SpeedGoal, Tensors

SIZES = {"1e7": (1, 10_000_000), "1e5": (1, 100_000), "64x1e4": (64, 10_000)}
QUICK_ELEMENTS = 1_000_000


@dataclass(frozen=True)
class Start:
    """Vectors (B, n) in the middle of a solve, where the identities of CG hold."""

    x: Tensor
    r: Tensor
    p: Tensor
    ap: Tensor

    @classmethod
    def after_two_iterations(cls, systems: int, n: int, device: torch.device) -> Start:
        """Of a diagonal matrix with entries from 1 to 2, in float64, then rounded."""
        rng = torch.Generator(device).manual_seed(0)
        d = 1 + torch.rand(n, generator=rng, device=device).double()
        r = torch.randn(systems, n, generator=rng, device=device).double()
        x, p, rr = torch.zeros_like(r), r, textbook.dot(r, r)
        for _ in range(2):
            x, r, p, rr = textbook.cg_step(x, r, p, d * p, rr)
        return cls(x.float(), r.float(), p.float(), (d * p).float())

    def rows(self, dtype: torch.dtype) -> Tensors:
        """x, r, p, ap as a textbook has them: a single system without a batch."""
        return tuple(_without_batch(t).to(dtype) for t in (self.x, self.r, self.p, self.ap))


def _without_batch(rows: Tensor) -> Tensor:
    return rows[0] if len(rows) == 1 else rows


class KernelStep:
    """A step of ours, from the start."""

    def __init__(self, start: Start):
        systems, n = start.x.shape
        self._start, device = start, start.x.device
        self._backend = kernels.backend("auto", device, start.x.dtype)
        partials = self._backend.partial_count(n)
        self._x, self._r, self._p = (torch.empty_like(t) for t in (start.x, start.r, start.p))
        self._dots = torch.empty(2, systems, partials, dtype=torch.float64, device=device)
        self._rr = torch.zeros(systems, partials, dtype=torch.float64, device=device)
        self._rr[:, 0] = kernels.row_norms(start.r).square()
        self._rr_out = torch.empty_like(self._rr)
        self._state = torch.zeros(2, systems, dtype=torch.int32, device=device)
        self._state[0] = kernels.status.RUNNING_POSITIVE  # what two iterations have seen
        self._state_out = torch.empty_like(self._state)
        self._threshold = torch.zeros(systems, dtype=torch.float64, device=device)
        self._residual_sq = torch.empty_like(self._threshold)

    def reset(self) -> None:
        for vector, start in zip(
            (self._x, self._r, self._p),
            (self._start.x, self._start.r, self._start.p),
            strict=True,
        ):
            vector.copy_(start)

    def __call__(self) -> Tensors:
        ap = self._start.ap
        self._backend.cg_dots(self._p, ap, self._state, self._dots)
        self._backend.cg_step(
            self._x,
            self._r,
            self._p,
            ap,
            self._dots,
            self._rr,
            self._state,
            self._threshold,
            1000,
            self._rr_out,
            self._state_out,
            self._residual_sq,
        )
        return tuple(map(_without_batch, (self._x, self._r, self._p)))


def ours(start: Start, repeats: int) -> Entry:
    steps = [KernelStep(start) for _ in range(repeats)]

    def prepare() -> Run:
        for step in steps:
            step.reset()
        return lambda: [step() for step in steps][-1]

    return Entry(OURS, prepare)


def plain(start: Start, repeats: int) -> Entry:
    x, r, p, ap = start.rows(start.x.dtype)
    rr = textbook.dot(r, r)

    def run() -> Tensors:
        for _ in range(repeats):
            answer = textbook.cg_step(x, r, p, ap, rr)
        return answer[:3]

    return Entry(PLAIN, lambda: run)


def build(systems: int, n: int, setting: Setting) -> Problem:
    n = min(n, QUICK_ELEMENTS) if setting.quick else n
    start = Start.after_two_iterations(systems, n, setting.device)
    x, r, p, ap = start.rows(torch.float64)
    repeats = 10 if setting.device.type == "cuda" else 1  # a single launch would time the host
    return Problem(
        about=f"B = {systems}, n = {n:,}, float32",
        expected=textbook.cg_step(x, r, p, ap, textbook.dot(r, r))[:3],
        # What n float32 roundings of a dot product add up to.
        tolerance=n**0.5 * torch.finfo(torch.float32).eps,
        entries=[ours(start, repeats), plain(start, repeats)],
        repeats=repeats,
        goals=[SpeedGoal(PLAIN, 4.0)] if n == 10_000_000 else [],
    )


CASES = [
    Case(f"steps/cg-{name}", f"one CG iteration without its matvec, {name}", partial(build, *size))
    for name, size in SIZES.items()
]
