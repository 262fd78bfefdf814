"""Solvers on dense systems, asked for a residual of 1e-8 each by its own test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tritonimplicit.linear_solve as ls
from bench import jax_peers, textbook
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
from bench.libraries import library
from bench.systems import GENERAL, INDEFINITE, MAKERS, SPD, System, system
from tritonimplicit.linear_solve import IterativeSolver

RTOL = 1e-8
SLACK = 10.0
"""Each library tests another residual: of a recurrence, absolute, in another norm."""
Matvec = Callable[[Tensor], Tensor]
Solve = Callable[[Matvec, Tensor], Any]
JaxSolve = Callable[[Callable[[Any], Any], Any], Any]

OURS_BY_KIND: dict[str, dict[str, type[IterativeSolver]]] = {
    SPD: {OURS: ls.CG, f"{OURS}, MINRES": ls.MINRES},
    GENERAL: {OURS: ls.GMRES, f"{OURS}, BiCGSTAB": ls.BiCGSTAB, f"{OURS}, normal CG": ls.NormalCG},
    INDEFINITE: {OURS: ls.MINRES, f"{OURS}, GMRES": ls.GMRES, f"{OURS}, BiCGSTAB": ls.BiCGSTAB},
}
JAX_BY_KIND: dict[str, list[tuple[str, str, str]]] = {
    SPD: [("JAXopt, CG", "JAXopt", "solve_cg"), ("lineax, CG", "lineax", "CG")],
    GENERAL: [
        ("JAXopt, GMRES", "JAXopt", "solve_gmres"),
        ("JAXopt, BiCGSTAB", "JAXopt", "solve_bicgstab"),
        ("JAXopt, normal CG", "JAXopt", "solve_normal_cg"),
        ("lineax, GMRES", "lineax", "GMRES"),
        ("lineax, BiCGSTAB", "lineax", "BiCGStab"),
    ],
    INDEFINITE: [
        ("JAXopt, GMRES", "JAXopt", "solve_gmres"),
        ("JAXopt, BiCGSTAB", "JAXopt", "solve_bicgstab"),
        ("lineax, GMRES", "lineax", "GMRES"),
        ("lineax, BiCGSTAB", "lineax", "BiCGStab"),
    ],
}
"""Title, library, and what that calls its solver."""


def multiply(a: Tensor, v: Tensor) -> Tensor:
    """A v, or of each system of a batch."""
    return a @ v if v.ndim == 1 else torch.bmm(a, v[..., None])[..., 0]


def in_torch(name: str, given: System, solve: Solve) -> Entry:
    """An entry that hands `solve` a matvec and b."""

    def matvecs() -> int:
        count = 0

        def counted(v: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return multiply(given.a, v)

        solve(counted, given.b)
        return count

    def run() -> Tensors:
        return (solve(lambda v: multiply(given.a, v), given.b),)

    return Entry(name, lambda: run, matvecs)


def ours(given: System) -> Iterator[Entry]:
    limit, batch_ndim = 10 * given.b.shape[-1], given.b.ndim - 1
    for name, solver in OURS_BY_KIND[given.kind].items():
        settings: dict[str, Any] = {"rtol": RTOL, "maxiter": limit, "batch_ndim": batch_ndim}
        yield in_torch(name, given, solver(**settings, on_failure="ignore"))


def torchopt(given: System) -> Entry | Absent:
    module = library("TorchOpt")
    if isinstance(module, Absent):
        return module
    symmetric_definite = given.kind == SPD
    factory = "solve_cg" if symmetric_definite else "solve_normal_cg"
    settings = {"rtol": RTOL, "maxiter": 10 * given.b.shape[-1]}
    solve = getattr(module.linear_solve, factory)(**settings)
    name = "TorchOpt" if symmetric_definite else "TorchOpt, normal CG"
    if given.b.ndim == 1:
        return in_torch(name, given, solve)

    def run() -> Tensors:
        pairs = zip(given.a, given.b, strict=True)
        return (torch.stack([solve(partial(torch.mv, a), b) for a, b in pairs]),)

    return Entry(f"{name}, a loop", lambda: run)


def hypertorch(given: System) -> Entry | Absent:
    module = library("hypertorch")
    if isinstance(module, Absent):
        return module
    if given.kind != SPD or given.b.ndim > 1:
        return Absent("hypertorch", "its solver is CG, of one system")
    tolerance = RTOL * given.b.norm().item()  # its test is absolute

    def solve(matvec: Matvec, b: Tensor) -> Tensor:
        (x,) = module.CG_torch.cg(lambda v: [matvec(v[0])], [b], 10 * len(b), tolerance)
        return x  # type: ignore[no-any-return]

    return in_torch("hypertorch", given, solve)


def linear_operator(given: System) -> Entry | Absent:
    module = library("linear_operator")
    if isinstance(module, Absent):
        return module
    if given.kind != SPD:
        return Absent("linear_operator", "its solver is CG")

    def solve(matvec: Matvec, b: Tensor) -> Tensor:
        def product(v: Tensor) -> Tensor:
            return matvec(v[..., 0])[..., None]

        # Its eps is absolute: the default of 1e-10 takes smaller p.Ap for zero, and stalls at 1e-5.
        settings = {"tolerance": RTOL, "max_iter": 10 * b.shape[-1], "eps": 1e-40}
        x: Tensor = module.utils.linear_cg(product, b[..., None], max_tridiag_iter=0, **settings)
        return x[..., 0]

    return in_torch("linear_operator", given, solve)


def in_jax(given: System, setting: Setting) -> Iterator[Entry | Absent]:
    for title, name, solver in JAX_BY_KIND[given.kind]:
        module = jax_peers.jax_library(name, setting)
        if isinstance(module, Absent):
            yield Absent(title, module.reason)
        else:
            make = _jaxopt if name == "JAXopt" else _lineax
            yield _jax_entry(title, make(module, solver, given), given)


def _jaxopt(module: Any, solver: str, given: System) -> JaxSolve:
    settings: dict[str, Any] = {"tol": RTOL, "maxiter": 10 * given.b.shape[-1]}
    return lambda matvec, b: getattr(module.linear_solve, solver)(matvec, b, **settings)


def _lineax(module: Any, solver: str, given: System) -> JaxSolve:
    import jax

    # Its tolerances are for each element: together these are at most RTOL of the whole.
    scale = float((given.b.norm(dim=-1) / given.b.shape[-1] ** 0.5).min())
    limit = 10 * given.b.shape[-1]
    how = getattr(module, solver)(rtol=0.0, atol=RTOL * scale, max_steps=limit)
    tags = [module.positive_semidefinite_tag] if given.kind == SPD else []

    def solve(matvec: Callable[[Any], Any], b: Any) -> Any:
        like = jax.ShapeDtypeStruct(b.shape, b.dtype)
        operator = module.FunctionLinearOperator(matvec, like, tags)
        return module.linear_solve(operator, b, how, throw=False).value

    return solve


def _jax_entry(title: str, solve: JaxSolve, given: System) -> Entry:
    import jax

    def one(a: Any, b: Any) -> Any:
        return solve(lambda v: a @ v, b)

    def matvecs() -> int:
        calls = jax_peers.Calls()
        a, b = jax_peers.to_jax((given.a, given.b))
        jax.block_until_ready(jax.jit(lambda a, b: solve(calls.counted(lambda v: a @ v), b))(a, b))
        jax.effects_barrier()
        return calls.count

    single = given.b.ndim == 1
    function = one if single else jax.vmap(one)
    # lineax and JAXopt take the product apart, or transpose it, where it is not to have effects.
    countable = single and title == "JAXopt, CG"
    return jax_peers.entry(title, function, (given.a, given.b), matvecs if countable else None)


def plain(given: System) -> Iterator[Entry]:
    if given.kind == SPD:
        yield in_torch(f"{PLAIN}, textbook CG", given, textbook.cg_to(RTOL))

    def direct() -> Tensors:
        return (torch.linalg.solve(given.a, given.b),)

    yield Entry(f"{PLAIN}, torch.linalg.solve", lambda: direct)


def build(name: str, setting: Setting) -> Problem:
    given = system(name, setting.device)

    def error(answer: Tensors) -> float:
        (x,) = answer
        if x.shape != given.b.shape:
            return float("nan")
        residual = (given.b - multiply(given.a, x)).norm(dim=-1) / given.b.norm(dim=-1)
        return float(residual.max())

    entries: list[Entry | Absent] = [*ours(given)]
    entries += [torchopt(given), hypertorch(given), linear_operator(given)]
    entries += [*in_jax(given, setting), *plain(given)]
    return Problem(
        about=f"{given.about}, {given.kind}, float64, to {RTOL:g}",
        expected=(),
        tolerance=SLACK * RTOL,
        entries=entries,
        compares=SAME_RESIDUAL,
        error=error,
        error_is="‖b - A x‖ / ‖b‖, of the worst system",
    )


CASES = [
    Case(f"solvers/{name}", f"solvers on a dense system: {name}", partial(build, name))
    for name in MAKERS
]
