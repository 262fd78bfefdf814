"""The implicit function theorem in reverse mode, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonimplicit.linear_solve.solve import (
    LinearFamily,
    checked_solution,
    linear_solve,
    replace_at,
)
from tritonimplicit.operators import Jacobian, Tensors, pullback


def root_vjp(
    family: LinearFamily, x: Tensors, args: Tensors, wrt: Sequence[int], cotangents: Tensors
) -> tuple[Tensors, Jacobian | None]:
    """Pull cotangents of the root x, fn(x, args) = 0, back into the args numbered by `wrt`.

    With A = d fn / d x: A^T u = -cotangents, then (d fn / d args)^T u. One evaluation of fn and one
    solve; where autograd records (create_graph=True, torch.func), a second evaluation, and a result
    that is differentiable again. Returns also the recorded Jacobian, where there is one.
    """
    negated = tuple(-t for t in cotangents)
    if torch.is_grad_enabled():
        u = linear_solve(family, x, args, negated, transpose=True)

        def residual(*some: Tensor) -> Tensors:
            return family.fn(x, replace_at(args, wrt, some))

        return pullback(residual, *(args[i] for i in wrt))(u), None
    jacobian = Jacobian(family.fn, x, args, wrt)
    u = checked_solution(family.solve(jacobian.T, negated), negated)
    return jacobian.vjp_args(u), jacobian
