"""The loop of an iterative solver: when to stop, and the truth at the end."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.linear_solve.base import IterativeSolver
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit_kernels import status as codes

_SMALLEST = 1e-140
"""Below this, squares of float64 numbers lose their digits, and no residual can be judged."""


class Progress:
    """What the launches read and write of B systems besides their vectors, on the device.

    `rr` (B, P) partial sums of the squared residual norm, `state` (2, B) status codes and
    iterations; what a launch both reads and writes ping-pongs with `rr_out` and `state_out`.
    `threshold` (B,) is the squared tolerance, `residual_sq` (B,) the last known squared residual
    norm. All but `state` are float64.
    """

    def __init__(self, residual_norm: Tensor, tolerance: Tensor, partials: int):
        systems, device = residual_norm.shape[0], residual_norm.device
        self.rr = residual_norm.new_zeros(systems, partials)
        self.rr[:, 0] = residual_norm.square()
        self.rr_out = torch.zeros_like(self.rr)
        self.state = torch.zeros(2, systems, dtype=torch.int32, device=device)
        self.state[0] = codes.RUNNING
        self.state_out = self.state.clone()
        self.threshold = tolerance.square()
        self.residual_sq = residual_norm.square()

    def swap(self) -> None:
        """Make the last launch's output the next one's input."""
        self.rr, self.rr_out = self.rr_out, self.rr
        self.state, self.state_out = self.state_out, self.state

    def any_running(self) -> Tensor:
        """0-dim bool: whether a system is above its threshold (a frozen one's sums are zero)."""
        return (self.rr.sum(1) > self.threshold).any()

    def settle(self) -> None:
        """Give the systems that no launch has stopped the status that the next one would."""
        running = self.state[0] < 0
        rr = self.rr.sum(1)
        self.residual_sq = torch.where(running, rr, self.residual_sq)
        ended = torch.where(rr <= self.threshold, codes.CONVERGED, codes.MAX_ITERATIONS)
        ended = torch.where(rr.isfinite(), ended, codes.NON_FINITE)
        self.state[0] = torch.where(running, ended.int(), self.state[0])

    def restart(self, rows: Tensor, residual_norm: Tensor) -> None:
        """Let the systems numbered by `rows` run again, from these residual norms (B,)."""
        self.state[0, rows] = codes.RUNNING
        self.rr[rows] = 0.0
        self.rr[rows, 0] = residual_norm[rows].square()


class Poll:
    """Learns from the device whether a system still runs, at a GPU without stalling it.

    On a CPU the answer is read at once. On a GPU it is copied into pinned memory without blocking
    and read one poll late, when the device has long passed that point.
    """

    def __init__(self, device: torch.device):
        self._late = device.type == "cuda"
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, any_running: Tensor) -> bool:
        """Whether a system ran: now, or on a GPU at the poll before."""
        if not self._late:
            return bool(any_running)
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(any_running, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(any_running.device))
        before, self._pending = self._pending, (flag, event)
        if before is None:
            return True
        before[1].synchronize()
        return bool(before[0])


class Recurrence(abc.ABC):
    """A method's vectors and its step; x (B, ld) is updated in place."""

    apply: RowMatvec
    b: Tensor
    x: Tensor
    progress: Progress

    @abc.abstractmethod
    def step(self) -> None:
        """Do one iteration: a matvec and the launches of `tritonimplicit_kernels`."""

    @abc.abstractmethod
    def restart(self, rows: Tensor, residual: Tensor) -> None:
        """Begin again at x for the systems numbered by `rows`; `residual` (B, ld) is b - A x."""

    def finish(self) -> None:  # noqa: B027 (most have nothing to do)
        """Bring x up to date with `progress`: called when no system runs any more."""


def iterate(recurrence: Recurrence, maxiter: int, check_every: int | None) -> None:
    """Step until no system runs, or `maxiter` times; ask every `check_every` (None: 1; 0: no)."""
    every = 1 if check_every is None else check_every
    progress = recurrence.progress
    poll = Poll(progress.rr.device)
    for k in range(maxiter):
        if every and k % every == 0 and not poll(progress.any_running()):
            return
        recurrence.step()
        progress.swap()


def solve_and_verify(
    solver: IterativeSolver, recurrence: Recurrence, always: bool = False
) -> RowSolution:
    """Iterate, then hold what claims convergence against the true residual b - A x.

    A system whose claim does not hold is restarted from its true residual as long as that at least
    halves the residual; then it is STAGNATED. The true residual costs one matvec, and is left out
    where nothing claims convergence, unless `always`: the residual norm is then the recurrence's.
    """
    progress, apply = recurrence.progress, recurrence.apply
    limit = remaining = solver.iteration_limit(apply.layout)
    residual_norm = torch.full_like(progress.threshold, math.inf)
    while True:
        iterate(recurrence, remaining, solver.check_every)
        progress.settle()
        recurrence.finish()
        status, iterations = progress.state
        claims = status == codes.CONVERGED
        refuted = status == codes.STAGNATED
        if not (always or solver.check_every == 0 or bool((claims | refuted).any())):
            residual_norm = progress.residual_sq.sqrt()
            break
        before, residual = residual_norm, apply.residual(recurrence.x, recurrence.b)
        residual_norm = kernels.row_norms(residual)
        unfounded = claims & ~(residual_norm.square() <= progress.threshold)
        status.masked_fill_(unfounded, codes.STAGNATED)
        judged = status < codes.BREAKDOWN
        status.masked_fill_(judged & ~residual_norm.isfinite(), codes.NON_FINITE)
        again = unfounded & (residual_norm < 0.5 * before) & (iterations < limit)
        if solver.check_every == 0 or not bool(again.any()):
            break
        rows = again.nonzero().squeeze(1)
        recurrence.restart(rows, residual)
        progress.restart(rows, residual_norm)
        remaining = limit - int(iterations[rows].min())
    if recurrence.b.dtype is torch.float64:
        largest = torch.linalg.vector_norm(recurrence.b, math.inf, dim=1)
        vanishing = (largest > 0) & (largest < _SMALLEST)
        status.masked_fill_(vanishing & (status == codes.CONVERGED), codes.BREAKDOWN)
    # x may overflow where the residual, of a matrix of small elements, does not.
    status.masked_fill_(~recurrence.x.isfinite().all(1), codes.NON_FINITE)
    return RowSolution(recurrence.x, status, iterations, residual_norm)
