"""torchdeq's solvers, stopped at the first iterate that reaches a residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from bench.case import Absent, Entry, Tensors
from bench.deq.equilibrium import LIMIT, Map, counted_entry
from bench.libraries import library

NAME = "torchdeq"


@dataclass(frozen=True)
class Solver:
    """Its name in tables and in torchdeq.solver, and the first iterate that it can return.

    `counts_from` is what it calls that iterate, `least` the `max_iter` that ends there.
    """

    label: str
    function: str
    counts_from: int
    least: int


SOLVERS = (
    Solver("fixed point", "fixed_point_iter", counts_from=1, least=1),
    Solver("Anderson", "anderson_solver", counts_from=3, least=3),
    Solver("Broyden", "broyden_solver", counts_from=2, least=1),
)
LOOK_AMONG = (20, 60, LIMIT)
"""First iterates: Broyden's later ones are dear."""
DEFAULT = {"max_iter": 40, "tol": 1e-6, "stop_mode": "abs"}
"""Of the backward pass of `get_deq(ift=True)`, by fixed-point iteration."""


def entries(
    make: Callable[[], Map], start: Tensor, reaches: Callable[[Tensor], bool]
) -> Iterator[Entry | Absent]:
    """All solvers on z = f(z), f made by `make`.

    torchdeq tests other residuals than the true one, so each solver is told how many iterations it
    may do: the least number whose result, by `reaches`, is good enough; the tests are not timed.
    """
    module = library(NAME)
    for solver in SOLVERS:
        if isinstance(module, Absent):
            yield Absent(f"{NAME}, {solver.label}", module.reason)
        else:
            yield _entry(module, solver, make, start, reaches)


def default_backward(make: Callable[[], Map], start: Tensor) -> Entry | Absent:
    """What torchdeq does in a backward pass, if it is told no more than `ift=True`."""
    module, label = library(NAME), f"{NAME}, default"
    if isinstance(module, Absent):
        return Absent(label, module.reason)
    solve = module.solver.fixed_point_iter

    return counted_entry(label, make, lambda f: (solve(f, start, **DEFAULT)[0],))


def _entry(
    module: ModuleType,
    solver: Solver,
    make: Callable[[], Map],
    start: Tensor,
    reaches: Callable[[Tensor], bool],
) -> Entry:
    solve = getattr(module.solver, solver.function)
    found: list[int] = []

    def run(f: Map) -> Tensors:
        if not found:
            found.append(_least(solve, solver, make(), start, reaches))
        return (solve(f, start, max_iter=found[0], tol=0.0)[0],)

    return counted_entry(f"{NAME}, {solver.label}", make, run)


def _least(
    solve: Callable[..., tuple[Tensor, list[Tensor], object]],
    solver: Solver,
    f: Map,
    start: Tensor,
    reaches: Callable[[Tensor], bool],
) -> int:
    """The least max_iter with a good result; LIMIT where there is none."""
    for limit in LOOK_AMONG:
        places = list(range(solver.counts_from, limit + solver.counts_from))
        _, iterates, _ = solve(f, start, max_iter=limit, tol=0.0, indexing=places)
        for i, iterate in enumerate(iterates):
            if reaches(iterate):
                return solver.least + i
    return LIMIT
