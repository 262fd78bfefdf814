"""The forward pass of a DEQ: z = f(z) from zeros, until the true residual is small enough."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import tritonimplicit.fixed_point as fp
from bench.case import (
    OURS,
    PLAIN,
    SAME_RESIDUAL,
    Absent,
    Case,
    Entry,
    Problem,
    Setting,
    Tensors,
)
from bench.deq import torchdeq_solvers
from bench.deq.equilibrium import (
    LIMIT,
    MODELS,
    RULES,
    Equilibrium,
    Map,
    counted_entry,
    norms,
    relative,
    trained,
)
from tritonimplicit.fixed_point import FixedPointSolver

RTOLS = {"1e-3": 1e-3, "1e-5": 1e-5}
SOLVERS: dict[str, type[FixedPointSolver]] = {
    OURS: fp.Anderson,  # as nn.DEQ does by default
    f"{OURS}, Broyden": fp.Broyden,
    f"{OURS}, Picard": fp.Picard,
}


def ours(name: str, solver: FixedPointSolver, problem: Equilibrium) -> Entry:
    def run(f: Map) -> Tensors:
        return (solver.solve(f, problem.start).value,)

    return counted_entry(name, lambda: problem.f, run)


def plain(problem: Equilibrium, rtol: float, rule: str) -> Entry:
    """z <- f(z), as one writes it."""

    def run(f: Map) -> Tensors:
        z = problem.start
        for _ in range(LIMIT):
            after = f(z)
            residual = after - z
            if rule == "worst":
                done = bool((norms(residual) <= rtol * norms(after)).all())
            else:
                done = bool(residual.norm() <= rtol * after.norm())
            if done:
                break
            z = after
        return (z,)

    return counted_entry(f"{PLAIN}, iteration", lambda: problem.f, run)


def _evaluation(problem: Equilibrium) -> Tensor:
    with torch.no_grad():
        return problem.f(problem.start)


def build(name: str, rtol: float, rule: str, setting: Setting) -> Problem:
    problem = trained(name, setting)
    exact = problem.double()

    def error(answer: Tensors) -> float:
        z = answer[0].double()
        fz = exact.f(z)
        return relative(fz - z, fz, rule)

    # Twice the rounding of an evaluation: of the solver's own test, and of its last iterate.
    off = problem.f(problem.z).double() - exact.f(exact.z)
    tolerance = rtol + 2 * relative(off, exact.z, rule)
    entries: list[Entry | Absent] = [
        ours(provider, solver(rtol=rtol, maxiter=LIMIT, batch_ndim=int(rule == "worst")), problem)
        for provider, solver in SOLVERS.items()
    ]

    def reaches(z: Tensor) -> bool:  # in float32, as ours tests it
        fz = problem.f(z)
        return relative(fz - z, fz, rule) <= rtol

    entries += torchdeq_solvers.entries(lambda: problem.f, problem.start, reaches)
    entries.append(plain(problem, rtol, rule))
    shape = " x ".join(map(str, problem.z.shape))
    return Problem(
        about=f"{MODELS[name]}, z {shape}, float32: residual {rtol:g} of the "
        f"{'worst sample' if rule == 'worst' else 'whole batch'}, within {LIMIT} evaluations",
        expected=(),
        tolerance=tolerance,
        entries=entries,
        compares=SAME_RESIDUAL,
        error=error,
        error_is="‖f(z) - z‖ / ‖f(z)‖ in float64",
        product=lambda: partial(_evaluation, problem),
    )


CASES = [
    Case(
        f"deq/forward-{name}-{label}-{rule}",
        f"forward solve of the {name} DEQ to {label}, {rule}",
        partial(build, name, rtol, rule),
        brief=label == "1e-3" and rule == "worst",
    )
    for name in MODELS
    for label, rtol in RTOLS.items()
    for rule in RULES
]
