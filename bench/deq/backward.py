"""The backward pass of a DEQ: (I - J^T) u = dl/dz, until the true residual is small enough."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import tritonimplicit.linear_solve as ls
from bench.case import (
    OURS,
    PLAIN,
    SAME_RESIDUAL,
    Absent,
    Case,
    Entry,
    Goal,
    Problem,
    ProductGoal,
    Setting,
    SpeedGoal,
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
    exact_adjoint,
    norms,
    relative,
    trained,
)
from tritonimplicit.linear_solve import IterativeSolver, LinearSolver

RTOLS = {"1e-3": 1e-3, "1e-6": 1e-6}
SOLVERS: dict[str, type[IterativeSolver]] = {
    OURS: ls.GMRES,  # as nn.DEQ does by default
    f"{OURS}, BiCGSTAB": ls.BiCGSTAB,
    f"{OURS}, Neumann": ls.Neumann,
}
GOALS: dict[str, list[Goal]] = {
    "conv": [
        SpeedGoal("torchdeq, Broyden", 6.0),
        SpeedGoal("torchdeq, fixed point", 1.4, f"{OURS}, Neumann"),
    ],
    "multiscale": [SpeedGoal("torchdeq, Broyden", 4.0)],
    "lm": [SpeedGoal("torchdeq, Broyden", 2.5), ProductGoal(16)],
}
"""To 1e-3 of the worst sample."""


def ours(name: str, solver: LinearSolver, problem: Equilibrium) -> Entry:
    def run(vjp: Map) -> Tensors:
        with torch.no_grad():
            return (solver(lambda v: v - vjp(v), problem.cotangent),)

    return counted_entry(name, problem.vjp, run)


def plain(problem: Equilibrium, rtol: float, rule: str) -> Entry:
    """u <- J^T u + g, as one writes it."""
    g = problem.cotangent
    scale = norms(g)

    def run(vjp: Map) -> Tensors:
        u = g
        for _ in range(LIMIT):
            after = vjp(u) + g
            residual = after - u
            if rule == "worst":
                done = bool((norms(residual) <= rtol * scale).all())
            else:
                done = bool(residual.norm() <= rtol * g.norm())
            if done:
                break
            u = after
        return (u,)

    return counted_entry(f"{PLAIN}, Neumann", problem.vjp, run)


def rounding(problem: Equilibrium, u: Tensor, exact: Map, rule: str) -> float:
    """What a float32 product with J^T is off by at the solution, against ‖g‖."""
    off = problem.vjp()(u.to(problem.z.dtype)).double() - exact(u)
    return relative(off, problem.cotangent.double(), rule)


def build(name: str, rtol: float, rule: str, setting: Setting) -> Problem:
    problem = trained(name, setting)
    exact = problem.double()
    double = exact.vjp()

    def error(answer: Tensors) -> float:
        u = answer[0].double()
        return relative(exact.cotangent - u + double(u), exact.cotangent, rule)

    # Twice the rounding of a product: that of the solver's own test, and that of its last iterate.
    tolerance = rtol + 2 * rounding(problem, exact_adjoint(name, setting), double, rule)

    def affine() -> Map:
        vjp = problem.vjp()
        return lambda u: vjp(u) + problem.cotangent

    entries: list[Entry | Absent] = [
        ours(
            provider,
            solver(rtol=rtol, maxiter=LIMIT, batch_ndim=int(rule == "worst"), on_failure="ignore"),
            problem,
        )
        for provider, solver in SOLVERS.items()
    ]
    zeros = torch.zeros_like(problem.cotangent)
    own = problem.vjp()

    def reaches(u: Tensor) -> bool:  # in float32, as ours tests it
        return relative(problem.cotangent - u + own(u), problem.cotangent, rule) <= rtol

    entries += torchdeq_solvers.entries(affine, zeros, reaches)
    entries.append(torchdeq_solvers.default_backward(affine, zeros))
    entries.append(plain(problem, rtol, rule))
    shape = " x ".join(map(str, problem.z.shape))
    judged = not setting.quick and rtol == 1e-3 and rule == "worst"
    return Problem(
        about=f"{MODELS[name]}, z {shape}, float32: residual {rtol:g} of the "
        f"{'worst sample' if rule == 'worst' else 'whole batch'}, within {LIMIT} products",
        expected=(),
        tolerance=tolerance,
        entries=entries,
        goals=GOALS[name] if judged else [],
        compares=SAME_RESIDUAL,
        error=error,
        error_is="‖g - (I - J^T) u‖ / ‖g‖ in float64",
        product=lambda: partial(problem.vjp(), problem.cotangent),
    )


CASES = [
    Case(
        f"deq/backward-{name}-{label}-{rule}",
        f"backward solve of the {name} DEQ to {label}, {rule}",
        partial(build, name, rtol, rule),
        brief=label == "1e-3" and rule == "worst",
    )
    for name in MODELS
    for label, rtol in RTOLS.items()
    for rule in RULES
]
