"""The loop of an iterative solver: when to stop, and the truth at the end."""

from __future__ import annotations

import abc
import math
from typing import ClassVar, Protocol

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import Status, statuses_in
from tritonimplicit.linear_solve.graphs import capture
from tritonimplicit.linear_solve.iterative import IterativeSolver
from tritonimplicit.linear_solve.progress import Poll, Progress
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution, largest
from tritonimplicit_kernels import status as codes

SMALLEST = 1e-140
"""Below this, squares of float64 numbers lose their digits, and no residual can be judged."""


class PollSettings(Protocol):
    """How often the host asks, and whether in between a CUDA graph is replayed."""

    @property
    def check_every(self) -> int | None:
        """Steps between two polls; None: 1, or 8 in a graph; 0: never ask."""
        ...

    def in_graphs(self) -> bool:
        """Whether the iterations are to be captured in CUDA graphs."""
        ...


class Steps(Protocol):
    """What is iterated."""

    progress: Progress

    def step(self) -> None:
        """Do one iteration."""

    def before_capture(self, steps: int) -> None:
        """Do what has to be done before so many steps are captured in a graph."""

    def captured(self) -> None:
        """Do what is left to do for steps that a graph has captured, before it is replayed."""


class Recurrence(abc.ABC):
    """A method's vectors and its step; x (B, ld) is updated in place."""

    products: ClassVar[int] = 1
    """How many products a step has that it may read from leaves in place."""

    apply: RowMatvec
    b: Tensor
    x: Tensor
    progress: Progress

    @abc.abstractmethod
    def step(self) -> None:
        """Do one iteration: matvecs, and the vector work of `tritonimplicit_kernels`."""

    @abc.abstractmethod
    def restart(self, again: Tensor, residual: Tensor) -> None:
        """Begin again at x where `again` (B,) bool says so; `residual` (B, ld) is b - A x."""

    def before_capture(self, steps: int) -> None:
        """Do what has to be done before so many steps are captured in a graph."""
        self.apply.before_capture(steps * self.products)

    def captured(self) -> None:
        """Do what is left to do for steps that a graph has captured, before it is replayed."""
        self.apply.captured()

    def finish(self) -> None:  # noqa: B027
        """Bring x up to date, where steps leave that to the end of a cycle."""


def iterate(solver: PollSettings, recurrence: Steps, limit: int) -> bool:
    """Step until no system runs, or `limit` times; return whether the poll ended it.

    The host asks every `check_every` steps (None: 1, or 8 in a graph; 0: never).
    """
    progress = recurrence.progress
    graphed = solver.in_graphs() and progress.history is None
    every = (8 if graphed else 1) if solver.check_every is None else solver.check_every
    poll = Poll(progress.rr.device)

    def advance() -> None:
        recurrence.step()
        progress.swap()
        progress.note()

    def advance_many() -> None:
        for _ in range(every):
            advance()

    replay, k = None, 0
    while k < limit:
        if every and k % every == 0 and not poll(progress.any_running()):
            return True
        if graphed and k == every:  # the first steps have warmed everything up
            recurrence.before_capture(every)
            replay = capture(advance_many, progress)
            if replay is not None:
                recurrence.captured()
        if replay is not None and k + every <= limit:
            replay()
            k += every
        else:
            advance()
            k += 1
    return False


def solve_and_verify(
    solver: IterativeSolver, recurrence: Recurrence, always: bool = False
) -> RowSolution:
    """Iterate, then hold what claims convergence against the true residual b - A x.

    A system whose claim does not hold is restarted from its true residual as long as that at least
    halves the residual; then it is STAGNATED. The true residual costs one matvec, and is left out
    where the limit ended the iteration and nothing claims convergence, unless `always`: the
    residual norm is then the recurrence's. With `check_every=0` the host reads nothing.
    """
    progress, apply, blind = recurrence.progress, recurrence.apply, solver.check_every == 0
    limit = remaining = solver.iteration_limit(apply.layout)
    residual_norm = torch.full_like(progress.threshold, math.inf)
    present: frozenset[Status] | None = None
    vanishing = _vanishing(recurrence.b)
    # CG's residual grows by at most the square root of the condition number, on the way to x.
    too_large = progress.residual_sq / torch.finfo(recurrence.b.dtype).eps
    while True:
        by_poll = iterate(solver, recurrence, remaining)
        recurrence.finish()
        progress.settle()
        status, iterations = progress.state
        grown = (status == codes.MAX_ITERATIONS) & (progress.residual_sq > too_large)
        status.masked_fill_(grown, codes.DIVERGED)
        if not (by_poll or always or blind):
            present = statuses_in(status)
            if not present & {Status.CONVERGED, Status.STAGNATED}:
                residual_norm = progress.residual_sq.sqrt()
                break
        before, residual = residual_norm, apply.residual(recurrence.x, recurrence.b)
        residual_norm = kernels.row_norms(residual)
        unfounded = (status == codes.CONVERGED) & ~(residual_norm.square() <= progress.threshold)
        status.masked_fill_(unfounded, codes.STAGNATED)
        judged = status < codes.BREAKDOWN
        # x may overflow where the residual, of a matrix of small elements, does not.
        finite = residual_norm.isfinite() & largest(recurrence.x).isfinite()
        status.masked_fill_(judged & ~finite, codes.NON_FINITE)
        if vanishing is not None:
            status.masked_fill_(vanishing & (status == codes.CONVERGED), codes.BREAKDOWN)
        if blind:
            break
        present = statuses_in(status)
        if Status.STAGNATED not in present:
            break
        again = unfounded & (residual_norm < 0.5 * before) & (iterations < limit)
        if not bool(again.any()):
            break
        recurrence.restart(again, residual)
        progress.restart(again, residual_norm)
        remaining = limit - int(torch.where(again, iterations, limit).min())
    return RowSolution(recurrence.x, status, iterations, residual_norm, present, progress.history)


def _vanishing(b: Tensor) -> Tensor | None:
    """(B,) whether a right hand side is too small for any residual to be judged; None: no."""
    if b.dtype is not torch.float64:
        return None
    size = largest(b)
    return (size > 0) & (size < SMALLEST)
