"""iMAML's hypergradient: the problem, its answer in plain torch, and both libraries' way to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from bench import textbook
from bench.case import OURS, PLAIN, Absent, Entry, Run, Tensors
from bench.libraries import library
from bench.products import Products

SOLVERS = {"cg": "solve_cg", "normal_cg": "solve_normal_cg"}


@dataclass(frozen=True)
class Imaml:
    """Parameters held near meta-parameters, adapted to data; and the outer gradient there.

    `objective(params, meta, x, y)` is that of one task. Where `batched`, the leading dimension of
    solution, x, y and cotangents counts tasks, which share `meta`.
    """

    objective: Callable[[Tensors, Tensors, Tensor, Tensor], Tensor]
    solution: Tensors
    meta: Tensors
    x: Tensor
    y: Tensor
    cotangents: Tensors
    batched: bool = False

    def total(self, params: Tensors, meta: Tensors) -> Tensor:
        """The objective, summed over the tasks."""
        if not self.batched:
            return self.objective(params, meta, self.x, self.y)
        each = torch.vmap(self.objective, in_dims=(0, None, 0, 0))(params, meta, self.x, self.y)
        return each.sum()

    def product(self) -> Callable[[], object]:
        """Record the gradient, and return a product of the Hessian with a vector."""
        params = tuple(t.detach().requires_grad_() for t in self.solution)
        slope = torch.autograd.grad(self.total(params, self.meta), params, create_graph=True)
        return partial(torch.autograd.grad, slope, params, self.cotangents, retain_graph=True)

    def double(self) -> Imaml:
        """The same in float64."""
        y = self.y.double() if self.y.is_floating_point() else self.y
        return replace(
            self,
            solution=_doubled(self.solution),
            meta=tuple(t.requires_grad_() for t in _doubled(self.meta)),
            x=self.x.double(),
            y=y,
            cotangents=_doubled(self.cotangents),
        )


def plain_run(
    problem: Imaml, solver: str, iterations: int, cg: textbook.Solve = textbook.cg
) -> Run:
    """The hypergradient by autograd and textbook CG on flat vectors, with nobody's library."""
    like = problem.solution
    batch = like[0].shape[: int(problem.batched)]
    sizes = [t[0].numel() if batch else t.numel() for t in like]

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(*batch, -1) for t in tensors], -1)

    def unflat(vector: Tensor) -> Tensors:
        pieces = vector.split(sizes, -1)
        return tuple(piece.reshape(t.shape) for piece, t in zip(pieces, like, strict=True))

    def run() -> Tensors:
        params = tuple(t.detach().requires_grad_() for t in like)
        slope = torch.autograd.grad(problem.total(params, problem.meta), params, create_graph=True)

        def hvp(v: Tensor) -> Tensor:
            return flat(torch.autograd.grad(slope, params, unflat(v), retain_graph=True))

        matvec, b = hvp, -flat(problem.cotangents)
        if solver == "normal_cg":  # the Hessian is its own transpose
            matvec, b = lambda v: hvp(hvp(v)), hvp(b)
        u = cg(matvec, b, iterations)
        return torch.autograd.grad(slope, problem.meta, unflat(u))

    return run


def expected(problem: Imaml, solver: str, iterations: int) -> Tensors:
    """The same iteration in float64."""
    return plain_run(problem.double(), solver, iterations, textbook.guarded_cg)()


def entries(
    problem: Imaml,
    solver: str,
    iterations: int,
    backward: Callable[[ModuleType, Imaml, Any], Run],
    peers: Sequence[str],
) -> list[Entry | Absent]:
    """Ours, peers that share our names, and plain torch.

    `backward(library, problem, solve)` runs the forward pass and returns the backward pass.
    """
    found: list[Entry | Absent] = []
    for name in (OURS, *peers):
        module = library(name)
        if isinstance(module, Absent):
            found.append(module)
        else:
            found.append(_entry(name, module, problem, solver, iterations, backward))
    return [*found, Entry(PLAIN, lambda: plain_run(problem, solver, iterations))]


def _entry(
    name: str,
    module: ModuleType,
    problem: Imaml,
    solver: str,
    iterations: int,
    backward: Callable[[ModuleType, Imaml, Any], Run],
) -> Entry:
    factory = getattr(module.linear_solve, SOLVERS[solver])
    solve = factory(rtol=0.0, atol=0.0, maxiter=iterations)

    def matvecs() -> int:
        products = Products()
        # Only a solver of ours itself learns of a vmap; one that is wrapped is told of the batch.
        batch = {"batch_ndim": 1} if name == OURS and problem.batched else {}
        counted = factory(rtol=0.0, atol=0.0, maxiter=iterations, **batch)
        backward(module, problem, products.counted(counted))()
        return products.count

    # TorchOpt's normal CG gets its transposed products by tracing, where nothing counts them.
    countable = name == OURS or solver == "cg"
    return Entry(name, lambda: backward(module, problem, solve), matvecs if countable else None)


def root_backward(module: ModuleType, problem: Imaml, solve: Any) -> Run:
    """The backward pass of one `custom_root`; a batch is one vmap over the decorated solver."""
    adapt = _adapted(module, problem, solve)
    if problem.batched:
        adapt = torch.func.vmap(adapt, in_dims=(0, None, 0, 0))
    outputs = adapt(problem.solution, problem.meta, problem.x, problem.y)
    return lambda: torch.autograd.grad(outputs, problem.meta, problem.cotangents)


def loop_backward(module: ModuleType, problem: Imaml, solve: Any) -> Run:
    """The backward pass of a loop over the tasks, for a library without vmap."""
    adapt = _adapted(module, problem, solve)
    outputs: list[Tensor] = []
    cotangents: list[Tensor] = []
    for task in range(len(problem.x)):
        init = tuple(t[task] for t in problem.solution)
        outputs += adapt(init, problem.meta, problem.x[task], problem.y[task])
        cotangents += [t[task] for t in problem.cotangents]
    return lambda: torch.autograd.grad(outputs, problem.meta, cotangents)


def _adapted(module: ModuleType, problem: Imaml, solve: Any) -> Callable[..., Tensors]:
    """A solver that is given the solution, so that the backward pass alone is work."""

    def adapt(init: Tensors, meta: Tensors, x: Tensor, y: Tensor) -> Tensors:
        return tuple(t.clone() for t in init)

    root = module.diff.implicit.custom_root(grad(problem.objective), argnums=1, solve=solve)
    adapted: Callable[..., Tensors] = root(adapt)
    return adapted


def penalty(params: Tensors, meta: Tensors, strength: float) -> Tensor:
    """0.5 strength ‖params - meta‖²."""
    squares = [(p - m).square().sum() for p, m in zip(params, meta, strict=True)]
    return 0.5 * strength * torch.stack(squares).sum()


def descend(
    objective: Callable[[Tensors], Tensor], params: Tensors, lr: float, steps: int
) -> Tensors:
    """Gradient descent."""
    for _ in range(steps):
        slope = grad(objective)(params)
        params = tuple(p - lr * s for p, s in zip(params, slope, strict=True))
    return params


def _doubled(tensors: Tensors) -> Tensors:
    return tuple(t.detach().double() for t in tensors)
