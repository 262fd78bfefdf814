"""Derivatives of a solve whose matvec is a plain function: autograd's, in what it closes over.

After the solve the product A x is recorded. A first derivative is taken of that recording, as of
any other operation: whatever the function sees when the backward pass comes, it is not called
again. A derivative that is to be differentiated (create_graph=True) calls it again, and checks that
it is the same function still.
"""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.family import OwnSolver
from tritonimplicit.operators import Matvec, Tensors, Transposable, graph_leaves, transpose
from tritonimplicit.torch_internals import refuse_legacy_batched


def solve_closed(solver: OwnSolver, matvec: Matvec, b: TensorTree) -> TensorTree:
    """Return x with A x = b, differentiable by autograd in b and in what `matvec` depends on.

    Where nothing requires grad this costs nothing; else the products of a solve, and two more.
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
    problem = _Problem(solver, matvec, spec, tuple(t.detach() for t in optree.tree_leaves(x)))
    product = problem.product(problem.values)  # part of the graph, as b is
    problem.product_values = tuple(t.detach() for t in product)
    flat = (*b_leaves, *product, *graph_leaves(product))
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
        if torch.is_grad_enabled():  # where a solver records it
            return self._matvec(v)
        with torch.set_grad_enabled(not self.looked):
            product = self._matvec(v)
        if not self.looked:
            self.looked = True
            leaves = optree.tree_leaves(product)
            self.requires_grad = any(isinstance(t, Tensor) and t.requires_grad for t in leaves)
        return optree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, product)


class _TransposableWatch(_Watch):
    """One that knows its transpose, as its matvec does."""

    @property
    def T(self) -> Matvec:
        """The matvec's own transpose."""
        transposed: Matvec = self._matvec.T  # type: ignore[attr-defined]
        return transposed


class _Problem:
    """What the graph keeps of a solve besides tensors; `values` are the solution's."""

    def __init__(self, solver: OwnSolver, matvec: Matvec, spec: optree.PyTreeSpec, values: Tensors):
        self.solver, self.matvec, self.spec, self.values = solver, matvec, spec, values
        self.product_values: Tensors = ()
        self._transposed = self._recorded_transpose()

    def product(self, v: Tensors) -> Tensors:
        """A v, on leaves, with a graph."""
        with torch.enable_grad():
            return tuple(optree.tree_leaves(self.matvec(self.tree(v))))

    def tree(self, leaves: Tensors) -> TensorTree:
        """The leaves in the structure of b."""
        return optree.tree_unflatten(self.spec, leaves)

    def solve_transposed(self, g: Tensors) -> Tensors:
        """A^-T g, differentiable where grad is enabled."""
        tree, transposed = self.tree(g), self._transposed
        if torch.is_grad_enabled():
            symmetric = self.solver.symmetric
            transposed = self.matvec if symmetric else transpose(self.matvec, like=tree)
        return tuple(optree.tree_leaves(self.solver.transposed()(transposed, tree)))

    def _recorded_transpose(self) -> Matvec:
        """u -> A^T u of the recorded A, without derivatives."""
        try:
            return transpose(self.matvec, like=self.tree(self.values))
        except RuntimeError:  # a product that autograd cannot pull back
            if self.solver.symmetric:
                return self.matvec
            raise


class _Solved(torch.autograd.Function):
    """(problem, *b, *A x, *leaves that A x depends on) -> x; the solution is there already.

    As x = A^-1 b, dx = A^-1 (db - dA x), and dA x is the change of the recorded product.
    """

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *flat: Tensor) -> Tensors:
        n = len(problem.values)
        x = tuple(t.detach() for t in problem.values)
        ctx.problem, ctx.n = problem, n
        ctx.set_materialize_grads(False)
        # Saved so that autograd notices a change in place before the backward pass.
        ctx.save_for_backward(*x, *flat[2 * n :])
        return x

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_legacy_batched(cotangents)
        if all(cotangent is None for cotangent in cotangents):  # behind a gate that is shut
            return (None,) * len(ctx.needs_input_grad)
        problem, n, saved = ctx.problem, ctx.n, ctx.saved_tensors
        x, leaves = saved[:n], saved[n:]
        given = zip(cotangents, x, strict=True)
        g = tuple(torch.zeros_like(t) if cotangent is None else cotangent for cotangent, t in given)
        w = problem.solve_transposed(g)
        opposite = tuple(-t for t in w)
        if torch.is_grad_enabled():  # create_graph=True
            return (None, *w, *(None,) * n, *_pull_into(leaves, problem, x, opposite))
        return (None, *w, *opposite, *(None,) * len(leaves))


def _pull_into(
    leaves: Tensors, problem: _Problem, x: Tensors, cotangents: Tensors
) -> tuple[Tensor | None, ...]:
    """Pull cotangents of A x back into the leaves that A depends on, x held fixed.

    The result is differentiable in x as well: x is shut off from this pull alone.
    """
    if not leaves:
        return ()
    gate = _Gate()
    y = problem.product(gate.guard(x))
    _check_unchanged(problem, y)
    live = [(out, cot) for out, cot in zip(y, cotangents, strict=True) if out.requires_grad]
    outputs, gradients = zip(*live, strict=True)
    pulled = torch.autograd.grad(
        outputs, leaves, gradients, create_graph=True, retain_graph=True, allow_unused=True
    )
    gate.open = True
    return pulled


def _check_unchanged(problem: _Problem, y: Tensors) -> None:
    """Raise RuntimeError if A x, taken anew as y, is not what it was in the forward pass."""
    for now, before in zip(y, problem.product_values, strict=True):
        difference = (now.detach() - before).norm()
        if difference > torch.finfo(before.dtype).eps ** 0.5 * before.norm():
            raise RuntimeError(
                "create_graph=True calls the matvec again in the backward pass, and it gives "
                "another result than in the forward pass (what it closes over has changed, or it "
                "is random): give a tritonimplicit.LinearOperator(fn, *tensors)."
            )


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
