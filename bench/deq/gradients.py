"""Exact and cheap gradients of a DEQ's parameters: what they cost, and where they point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import tritonimplicit.nn as ti_nn
from bench.case import OURS, Absent, Case, Entry, Figures, Problem, Run, Setting, Tensors
from bench.deq.equilibrium import MODELS, Equilibrium, Map, exact_adjoint, norms, trained
from bench.libraries import library
from tritonimplicit.fixed_point import Anderson
from tritonimplicit.linear_solve import GMRES, solve_inv
from tritonimplicit.nn.gradients import Gradient

SAME_POINT = "same fixed point; each method's error is against its own definition in float64"
FORWARD = Anderson(rtol=1e-3, batch_ndim=1)  # which begins where it may end
RTOL = 1e-3
"""Of the implicit gradient by default."""
MARGIN = 10.0
"""For a residual that is worse than a random one of its size: it may lie where I - J^T is small."""


@dataclass(frozen=True)
class Method:
    """A gradient of nn.DEQ, and the u that it is to pull back through f, by plain autograd."""

    gradient: Gradient
    adjoint: Callable[[Map, Tensor], Tensor]


def neumann(terms: int, vjp: Map, g: Tensor) -> Tensor:
    """The sum of (J^T)^i g for i < terms."""
    u = g
    for _ in range(terms - 1):
        u = vjp(u) + g
    return u


def phantom(steps: int, damping: float, vjp: Map, g: Tensor) -> Tensor:
    """damping times the sum of (damping J^T + 1 - damping)^i g for i < steps."""
    term, total = g, g
    for _ in range(steps - 1):
        term = damping * vjp(term) + (1 - damping) * term
        total = total + term
    return damping * total


def krylov(products: int, vjp: Map, g: Tensor) -> Tensor:
    """The u of least ‖g - (I - J^T) u‖ in the Krylov space of this dimension, for each sample."""
    rows = g.flatten(1)

    def product(v: Tensor) -> Tensor:
        return v - vjp(v.view_as(g)).flatten(1)

    basis = [rows / norms(rows)[:, None]]
    for _ in range(products - 1):
        w = product(basis[-1])
        for _ in range(2):
            for q in basis:
                w = w - torch.linalg.vecdot(q, w)[:, None] * q
        basis.append(w / norms(w)[:, None])
    images = torch.stack([product(q) for q in basis], 2)
    weights = torch.linalg.lstsq(images, rows[:, :, None]).solution
    u: Tensor = (torch.stack(basis, 2) @ weights)[:, :, 0]
    return u.view_as(g)


def gmres(products: int) -> Method:
    solver = GMRES(rtol=0.0, maxiter=products, batch_ndim=1)
    return Method(ti_nn.Implicit(solver), partial(krylov, products))


METHODS = {
    "GMRES, 5 products": gmres(5),
    "GMRES, 10 products": gmres(10),
    "JFB": Method(ti_nn.JFB(), partial(neumann, 1)),
    "Neumann, 5 terms": Method(
        ti_nn.Implicit(solve_inv(ns=True, maxiter=4, batch_ndim=1)), partial(neumann, 5)
    ),
    "phantom(5, 0.5)": Method(ti_nn.Phantom(5, 0.5), partial(phantom, 5, 0.5)),
}
TORCHDEQ: dict[str, dict[str, object]] = {
    "default": {},
    "phantom(5, 0.5)": {"grad": 5, "tau": 0.5},
    "ift=True": {"ift": True},
}


def pulled_back(problem: Equilibrium, u: Tensor) -> Tensors:
    """The gradient of the parameters that f depends on, through one evaluation of f."""
    with torch.enable_grad():
        fz = problem.model.cell(problem.z.detach(), *problem.model.inputs(problem.x))
    return torch.autograd.grad(fz, _parameters(problem), u)


def _parameters(problem: Equilibrium) -> Tensors:
    """Those that f depends on: the head has the same gradient by every method."""
    with torch.enable_grad():
        fz = problem.model.cell(problem.z.detach(), *problem.model.inputs(problem.x))
    parameters = tuple(problem.model.parameters())
    found = torch.autograd.grad(fz.sum(), parameters, allow_unused=True)
    return tuple(p for p, g in zip(parameters, found, strict=True) if g is not None)


def ours(name: str, problem: Equilibrium, gradient: Gradient) -> Entry:
    model, parameters = problem.model, _parameters(problem)
    deq = ti_nn.DEQ(model.cell, solver=FORWARD, gradient=gradient)

    def run() -> Tensors:
        z = deq(*model.inputs(problem.x), z0=problem.z)
        return torch.autograd.grad(z, parameters, problem.cotangent)

    return Entry(name, lambda: run)


def torchdeq(label: str, problem: Equilibrium) -> Entry | Absent:
    module, name = library("torchdeq"), f"torchdeq, {label}"
    if isinstance(module, Absent):
        return Absent(name, module.reason)
    deq = module.get_deq(f_tol=1e-3, f_stop_mode="rel", **TORCHDEQ[label])
    model, parameters = problem.model, _parameters(problem)

    def prepare() -> Run:
        def run() -> Tensors:
            inputs = model.inputs(problem.x)
            found, _ = deq(lambda z: model.cell(z, *inputs), problem.z)
            return torch.autograd.grad(found[-1], parameters, problem.cotangent)

        return run

    return Entry(name, prepare)


def build(name: str, setting: Setting) -> Problem:
    problem = trained(name, setting)
    exact = problem.double()
    vjp, g = exact.vjp(), exact.cotangent
    right = pulled_back(exact, exact_adjoint(name, setting))

    def figures(answer: Tensors) -> Figures:
        mine, true = (torch.cat([t.double().flatten() for t in ts]) for ts in (answer, right))
        cosine = F.cosine_similarity(mine, true, dim=0)
        return {"cosine": cosine.item(), "length": (mine.norm() / true.norm()).item()}

    def judged(entry: Entry | Absent, expected: Tensors, tolerance: float) -> Entry | Absent:
        if isinstance(entry, Absent):
            return entry
        return Entry(entry.provider, entry.prepare, entry.matvecs, figures, expected, tolerance)

    def own(adjoint: Callable[[Map, Tensor], Tensor]) -> Tensors:
        return pulled_back(exact, adjoint(vjp, g))

    to_rtol = tolerated(exact, right, name, setting)
    single = rounding(problem, exact, name, setting)
    entries = [judged(ours(OURS, problem, ti_nn.Implicit()), right, to_rtol)]
    for label, method in METHODS.items():
        entry = ours(f"{OURS}, {label}", problem, method.gradient)
        entries.append(judged(entry, own(method.adjoint), single))
    oracles = own(partial(neumann, 1)), own(partial(phantom, 5, 0.5)), right
    tolerances = single, single, to_rtol
    for label, expected, tolerance in zip(TORCHDEQ, oracles, tolerances, strict=True):
        entries.append(judged(torchdeq(label, problem), expected, tolerance))
    return Problem(
        about=f"{MODELS[name]}: one evaluation from the fixed point and the gradient of all "
        "parameters that f depends on; cosine with the exact one, and length against it",
        expected=right,
        tolerance=to_rtol,
        entries=entries,
        compares=SAME_POINT,
    )


def tolerated(exact: Equilibrium, right: Tensors, name: str, setting: Setting) -> float:
    """Relative error of a gradient whose adjoint leaves a residual of RTOL, in every sample."""
    vjp, g = exact.vjp(), exact.cotangent
    noise = torch.randn(g.shape, generator=torch.Generator().manual_seed(0)).to(g)
    shape = (-1, *[1] * (g.ndim - 1))
    residual = noise * (RTOL * norms(g) / norms(noise)).view(shape)
    solver = GMRES(rtol=1e-3, maxiter=1000, batch_ndim=1, on_failure="raise")
    with torch.no_grad():
        u = solver(lambda v: v - vjp(v), residual)
    off = pulled_back(exact, u)
    return MARGIN * float(_length(off) / _length(right))


def rounding(problem: Equilibrium, exact: Equilibrium, name: str, setting: Setting) -> float:
    """Relative error of float32 in pulling the exact adjoint back, and in ten products before."""
    u = exact_adjoint(name, setting)
    single, double = pulled_back(problem, u.float()), pulled_back(exact, u)
    off = _length(tuple(s.double() - d for s, d in zip(single, double, strict=True)))
    product = problem.vjp()(u.float()).double() - exact.vjp()(u)
    relative = off / _length(double) + 10 * product.norm() / exact.vjp()(u).norm()
    return MARGIN * float(relative)


def _length(tensors: Tensors) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors]))
    return length


CASES = [
    Case(
        f"deq/gradients-{name}",
        f"exact and cheap gradients of the {name} DEQ",
        partial(build, name),
    )
    for name in MODELS
]
