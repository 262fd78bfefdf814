"""A solver called directly: its result, connected to what autograd or a transform watches."""

from __future__ import annotations

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.closed import solve_closed
from tritonimplicit.linear_solve.rows import hidden_derivative
from tritonimplicit.linear_solve.solve import LinearFamily, OwnSolver, guess_of, linear_solve
from tritonimplicit.operators import LinearOperator, Matvec, Tensors
from tritonimplicit.torch_internals import forward_ad_active, has_derivative, transforms_active
from tritonimplicit.vectors import Layout


def solve_directly(solver: OwnSolver, matvec: Matvec, b: TensorTree) -> TensorTree:
    """Return x with A x = b, differentiable in b, the ridge and what the matvec depends on."""
    transformed = transforms_active() or forward_ad_active()
    if not (transformed or isinstance(matvec, LinearOperator)):
        if torch.is_grad_enabled() and callable(matvec):
            return solve_closed(solver, matvec, b)
        return solver.solve_plain(matvec, b)
    watched = [*optree.tree_leaves(b), solver.ridge, *optree.tree_leaves(guess_of(solver))]
    if isinstance(matvec, LinearOperator):
        watched += matvec.leaves
    if not any(isinstance(t, Tensor) and has_derivative(t) for t in watched):
        return solver.solve_plain(matvec, b)
    return _solve_openly(solver, matvec, b)


def _solve_openly(solver: OwnSolver, matvec: Matvec, b: TensorTree) -> TensorTree:
    """By the autograd.Function that holds under every transform, all tensors given openly."""
    layout = Layout.of(b, solver.batch_ndim)
    init = tuple(optree.tree_leaves(guess_of(solver)))
    solver, matvec, b = solver.equation(matvec, b)
    if isinstance(matvec, LinearOperator):
        operator = matvec
    else:
        _refuse_closure(matvec, b)
        operator = LinearOperator(matvec)
    leaves, spec = optree.tree_flatten(b)

    def product(v: Tensors, tensors: Tensors) -> Tensors:
        av = operator.at(tensors)(optree.tree_unflatten(spec, v))
        return tuple(layout.leaves_of(av, "the result of the matvec"))

    family = LinearFamily(product, solver, linear=True, symmetric=operator.symmetric)
    origin = tuple(torch.zeros_like(t) for t in leaves)
    args = tuple(operator.leaves)
    x = linear_solve(
        family.without_guess(), origin, args, tuple(leaves), transpose=False, init=init
    )
    return optree.tree_unflatten(spec, x)


def _refuse_closure(matvec: Matvec, like: TensorTree) -> None:
    """Raise RuntimeError if the matvec's result depends on more than its argument: one product."""
    zeros = optree.tree_map(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=t.device), like)
    with torch.enable_grad():
        product = matvec(zeros)
    if any(isinstance(t, Tensor) and has_derivative(t) for t in optree.tree_leaves(product)):
        raise hidden_derivative()
