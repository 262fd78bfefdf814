"""A solver called directly: its result, connected to what autograd or a transform watches."""

from __future__ import annotations

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_operator import LinearOperator
from tritonimplicit.linear_solve.closed import solve_closed
from tritonimplicit.linear_solve.family import LinearFamily, OwnSolver
from tritonimplicit.linear_solve.rows import hidden_derivative
from tritonimplicit.linear_solve.solve import guess_of, linear_solve
from tritonimplicit.operators import Matvec, Tensors
from tritonimplicit.torch_internals import (
    forward_ad_active,
    has_derivative,
    is_watched,
    transforms_active,
)
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
    operator = matvec if isinstance(matvec, LinearOperator) else LinearOperator(matvec)
    _refuse_closure(operator, b)
    solver, matvec, b = solver.equation(operator, b)
    assert isinstance(matvec, LinearOperator)
    operator = matvec
    leaves, spec = optree.tree_flatten(b)

    def product(v: Tensors, tensors: Tensors) -> Tensors:
        av = operator.at(tensors)(optree.tree_unflatten(spec, v))
        return tuple(layout.leaves_of(av, "the result of the matvec"))

    family = LinearFamily(
        product,
        solver.on_leaves(spec),
        linear=True,
        symmetric=operator.symmetric,
        positive_definite=operator.positive_definite,
    )
    origin = tuple(torch.zeros_like(t) for t in leaves)
    args = tuple(operator.leaves)
    x = linear_solve(
        family.without_guess(), origin, args, tuple(leaves), transpose=False, init=init
    )
    return optree.tree_unflatten(spec, x)


def _refuse_closure(operator: LinearOperator, like: TensorTree) -> None:
    """Raise RuntimeError if a product depends on more than the operator's tensors: one product.

    Under a transform that cannot be told of an operator that has tensors.
    """
    if operator.leaves and (transforms_active() or forward_ad_active()):
        return
    zeros = optree.tree_map(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=t.device), like)
    with torch.enable_grad():
        product = operator.at([t.detach() for t in operator.leaves])(zeros)
    if any(isinstance(t, Tensor) and is_watched(t) for t in optree.tree_leaves(product)):
        raise hidden_derivative()
