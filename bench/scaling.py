"""How the time of a solve grows: with its size, with its leaves, with its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import jax_peers, textbook
from bench.case import OURS, PLAIN, Absent, Case, Entry, Problem, Setting, Tensors
from bench.libraries import library

ITERATIONS, CONDITION = 20, 100.0
SIZES = {"1e3": 10**3, "1e4": 10**4, "1e5": 10**5, "1e6": 10**6, "1e7": 10**7}
LEAVES = (1, 10, 100, 1000)
OF_LEAVES = 100_000
BATCHES = (1, 4, 16, 64, 256, 1024)
OF_A_SYSTEM = 1000
BRIEF = ("size-1e3", "size-1e5", "size-1e7", "leaves-1", "leaves-100", "batch-1", "batch-64")
LOOPED = 64
"""Larger batches are not looped over: the time is in proportion."""


def diagonal(*shape: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """d with entries from 1 to 100, and a right-hand side."""
    rng = torch.Generator(device).manual_seed(0)
    d = 1 + (CONDITION - 1) * torch.rand(*shape, generator=rng, device=device)
    return d, torch.randn(*shape, generator=rng, device=device)


def exact(d: Tensor, b: Tensor) -> Tensors:
    """The same iterations in float64, as one vector or a batch of rows."""
    double = d.double()
    return (textbook.guarded_cg(lambda v: double * v, b.double(), ITERATIONS),)


def problem(about: str, d: Tensor, b: Tensor, entries: list[Entry | Absent]) -> Problem:
    return Problem(
        about=f"diagonal matrix, condition {CONDITION:g}, {about}, CG, {ITERATIONS} iterations, "
        "float32",
        expected=exact(d, b),
        # What the roundings of each iteration come to in x.
        tolerance=ITERATIONS * CONDITION * torch.finfo(d.dtype).eps,
        entries=entries,
    )


def _solvers(on: Callable[[Any], Callable[[], Tensor]]) -> Iterator[Entry | Absent]:
    """Ours, and the peer of our names: `on(solver)` solves the problem."""
    for name in (OURS, "TorchOpt"):
        module = library(name)
        yield module if isinstance(module, Absent) else _entry(name, on(solver_of(module)))


def _entry(name: str, solve: Callable[[], Tensor]) -> Entry:
    return Entry(name, lambda: lambda: (solve(),))


def _joined(solve: Callable[[], Tensors]) -> Tensor:
    return torch.cat(solve())


def plain(d: Tensor, b: Tensor) -> Entry:
    return Entry(PLAIN, lambda: lambda: (textbook.cg(lambda v: d * v, b, ITERATIONS),))


def solver_of(module: Any, **settings: Any) -> Any:
    return module.linear_solve.solve_cg(rtol=0.0, atol=0.0, maxiter=ITERATIONS, **settings)


def jaxopt(setting: Setting, tensors: Tensors) -> Entry | Absent:
    """d, then b, or as many leaves of each; one vector is returned."""
    module = jax_peers.jax_library("JAXopt", setting)
    if isinstance(module, Absent):
        return module
    half = len(tensors) // 2

    def solve(*arrays: Any) -> Any:
        import jax.numpy as jnp

        d, b = arrays[:half], arrays[half:]

        def matvec(v: Any) -> Any:
            return [x * y for x, y in zip(d, v, strict=True)]

        found = module.linear_solve.solve_cg(matvec, list(b), maxiter=ITERATIONS, tol=0.0)
        return jnp.concatenate(found, axis=-1)

    return jax_peers.entry("JAXopt", solve, tensors)


def linear_operator(d: Tensor, b: Tensor) -> Entry | Absent:
    module = library("linear_operator")
    if isinstance(module, Absent):
        return module
    column: Callable[[Tensor], Tensor] = lambda v: d[..., None] * v  # noqa: E731
    settings = {"max_iter": ITERATIONS, "tolerance": 0.0, "stop_updating_after": 0.0}

    def run() -> Tensors:
        x = module.utils.linear_cg(column, b[..., None], max_tridiag_iter=0, **settings)
        return (x[..., 0],)

    return Entry("linear_operator", lambda: run)


def by_size(n: int, setting: Setting) -> Problem:
    n = min(n, 10**6) if setting.quick else n
    d, b = diagonal(n, device=setting.device)
    entries = [
        *_solvers(lambda solve: partial(solve, lambda v: d * v, b)),
        *(linear_operator(d, b), jaxopt(setting, (d, b)), plain(d, b)),
    ]
    return problem(f"n = {n:,}", d, b, entries)


def by_leaves(count: int, setting: Setting) -> Problem:
    d, b = diagonal(OF_LEAVES, device=setting.device)
    split = tuple(t.clone() for t in d.chunk(count)), tuple(t.clone() for t in b.chunk(count))
    scales, leaves = split

    def matvec(v: Tensors) -> Tensors:
        return tuple(x * y for x, y in zip(scales, v, strict=True))

    entries = [
        *_solvers(lambda solve: partial(_joined, partial(solve, matvec, leaves))),
        Absent("linear_operator", "solves for one tensor"),
        jaxopt(setting, (*scales, *leaves)),
        _plain_of_leaves(matvec, leaves),
    ]
    return problem(f"n = {OF_LEAVES:,} in {count} leaves", d, b, entries)


def _plain_of_leaves(matvec: Callable[[Tensors], Tensors], leaves: Tensors) -> Entry:
    """By way of one flat vector."""
    sizes = [len(leaf) for leaf in leaves]

    def flat(v: Tensor) -> Tensor:
        return torch.cat(matvec(v.split(sizes)))

    return Entry(PLAIN, lambda: lambda: (textbook.cg(flat, torch.cat(leaves), ITERATIONS),))


def by_batch(systems: int, setting: Setting) -> Problem:
    d, b = diagonal(systems, OF_A_SYSTEM, device=setting.device)
    ours = solver_of(library(OURS), batch_ndim=1)
    entries: list[Entry | Absent] = [
        Entry(OURS, lambda: lambda: (ours(lambda v: d * v, b),)),
        _loop(d, b),
        linear_operator(d, b),
        *_vmapped(setting, d, b),
        plain(d, b),
    ]
    return problem(f"{systems} systems, n = {OF_A_SYSTEM:,}", d, b, entries)


def _loop(d: Tensor, b: Tensor) -> Entry | Absent:
    module, name = library("TorchOpt"), "TorchOpt, a loop"
    if isinstance(module, Absent):
        return Absent(name, module.reason)
    if len(b) > LOOPED:
        return Absent(name, f"in proportion to the loop over {LOOPED}")
    solve = solver_of(module)

    def run() -> Tensors:
        pairs = zip(d, b, strict=True)
        return (torch.stack([solve(partial(torch.mul, scale), each) for scale, each in pairs]),)

    return Entry(name, lambda: run)


def _vmapped(setting: Setting, d: Tensor, b: Tensor) -> Iterator[Entry | Absent]:
    module, name = jax_peers.jax_library("JAXopt", setting), "JAXopt, vmap"
    if isinstance(module, Absent):
        yield Absent(name, module.reason)
        return
    import jax

    def one(scale: Any, each: Any) -> Any:
        solve = module.linear_solve.solve_cg
        return solve(lambda v: scale * v, each, maxiter=ITERATIONS, tol=0.0)

    yield jax_peers.entry(name, jax.vmap(one), (d, b))


CASES = [
    *(
        Case(
            f"scaling/size-{name}", f"CG, n = {name}", partial(by_size, n), f"size-{name}" in BRIEF
        )
        for name, n in SIZES.items()
    ),
    *(
        Case(
            f"scaling/leaves-{n}", f"CG, {n} leaves", partial(by_leaves, n), f"leaves-{n}" in BRIEF
        )
        for n in LEAVES
    ),
    *(
        Case(f"scaling/batch-{n}", f"CG, {n} systems", partial(by_batch, n), f"batch-{n}" in BRIEF)
        for n in BATCHES
    ),
]
