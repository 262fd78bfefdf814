"""Derivatives of a solve whose matvec is a plain function: autograd's, in what it closes over.

The leaves that require grad are found in the graph of one product. First and higher derivatives
take the product anew, so that any function will do, a Hessian by torch.autograd.grad for one.
"""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.solve import OwnSolver
from tritonimplicit.operators import Matvec, Tensors, Transposable, graph_leaves, transpose


def solve_closed(solver: OwnSolver, matvec: Matvec, b: TensorTree) -> TensorTree:
    """Return x with A x = b, differentiable by autograd in b and in leaves that `matvec` reaches.

    Where nothing requires grad this costs nothing; else the products of a solve, and one more.
    """
    watch = (_TransposableWatch if isinstance(matvec, Transposable) else _Watch)(matvec)
    with torch.no_grad():
        x = solver.solve_plain(watch, b)
    inputs = [*optree.tree_leaves(b), solver.ridge]
    given = any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    if not (watch.looked or given):  # maxiter = 0, for one
        with torch.no_grad():
            watch(x)
    if not (given or watch.requires_grad):
        return x
    solver, matvec, b = solver.equation(matvec, b)
    b_leaves, spec = optree.tree_flatten(b)
    values = tuple(optree.tree_leaves(x))
    with torch.enable_grad():
        product = optree.tree_leaves(matvec(x))
    problem = _Problem(solver, matvec, spec, values)
    flat = (*b_leaves, *graph_leaves(product))
    return optree.tree_unflatten(spec, _Solved.apply(problem, *flat))  # type: ignore[no-untyped-call]


class _Watch:
    """A matvec that notices, at its first product, whether autograd watches what it uses."""

    def __init__(self, matvec: Matvec):
        self._matvec = matvec
        self.symmetric = getattr(matvec, "symmetric", False)
        self.positive_definite = getattr(matvec, "positive_definite", False)
        self.looked = False
        self.requires_grad = False

    def __call__(self, v: TensorTree) -> TensorTree:
        if self.looked or torch.is_grad_enabled():  # grad is enabled where a solver records it
            return self._matvec(v)
        self.looked = True
        with torch.enable_grad():
            product = self._matvec(v)
        leaves = [t for t in optree.tree_leaves(product) if isinstance(t, Tensor)]
        self.requires_grad = any(t.requires_grad for t in leaves)
        return optree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, product)


class _TransposableWatch(_Watch):
    """One that knows its transpose, as its matvec does."""

    @property
    def T(self) -> Matvec:
        """The matvec's own transpose."""
        transposed: Matvec = self._matvec.T  # type: ignore[attr-defined]
        return transposed


class _Problem:
    """What the graph keeps of a solve besides tensors; `values` is handed over to it once."""

    def __init__(self, solver: OwnSolver, matvec: Matvec, spec: optree.PyTreeSpec, values: Tensors):
        self.solver = solver.without_guess()  # which is one for b
        self.matvec, self.spec = matvec, spec
        self.values = values

    def product(self, v: Tensors) -> list[Tensor]:
        """A v, on leaves."""
        return optree.tree_leaves(self.matvec(optree.tree_unflatten(self.spec, v)))

    def solve_transposed(self, g: Tensors) -> Tensors:
        """A^-T g, differentiable where grad is enabled."""
        tree = optree.tree_unflatten(self.spec, g)
        matvec = self.matvec if self.solver.symmetric else transpose(self.matvec, like=tree)
        return tuple(optree.tree_leaves(self.solver(matvec, tree)))


class _Solved(torch.autograd.Function):
    """(problem, *b, *leaves that A depends on) -> x; the solution is there already."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *flat: Tensor) -> Tensors:
        x, problem.values = problem.values, ()
        ctx.problem, ctx.n = problem, len(x)
        ctx.set_materialize_grads(False)
        # Saved so that autograd notices a change in place before the backward pass.
        ctx.save_for_backward(*x, *flat[len(x) :])
        return x

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(cotangent is None for cotangent in cotangents):  # behind a gate that is shut
            return (None,) * len(ctx.needs_input_grad)
        problem, n, saved = ctx.problem, ctx.n, ctx.saved_tensors
        x, leaves = saved[:n], saved[n:]
        given = zip(cotangents, x, strict=True)
        g = tuple(torch.zeros_like(t) if cotangent is None else cotangent for cotangent, t in given)
        w = problem.solve_transposed(g)
        return (None, *w, *_pull_into(leaves, problem, x, tuple(-t for t in w)))


def _pull_into(
    leaves: Tensors, problem: _Problem, x: Tensors, cotangents: Tensors
) -> tuple[Tensor | None, ...]:
    """Pull cotangents of A x back into the leaves that A depends on, x held fixed.

    With grad enabled the result is differentiable in x as well: x is shut off from this pull alone.
    """
    if not leaves:
        return ()
    graph, gate = torch.is_grad_enabled(), _Gate()
    with torch.enable_grad():
        y = problem.product(gate.guard(x))
        live = [(out, cot) for out, cot in zip(y, cotangents, strict=True) if out.requires_grad]
        outputs, gradients = zip(*live, strict=True)
        pulled = torch.autograd.grad(
            outputs, leaves, gradients, create_graph=graph, retain_graph=True, allow_unused=True
        )
    gate.open = True
    return pulled


class _Gate:
    """Tensors through which no gradient passes until the gate is open."""

    open = False

    def guard(self, tensors: Tensors) -> Tensors:
        guarded: Tensors = _Guarded.apply(self, *tensors)  # type: ignore[no-untyped-call]
        return guarded


class _Guarded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: _Gate, *tensors: Tensor) -> Tensors:
        ctx.gate = gate
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(cotangents if ctx.gate.open else (None,) * len(cotangents)))
