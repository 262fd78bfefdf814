"""The autograd.Function of a root: the solver forward, the implicit function theorem backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tritonimplicit.diff.implicit.adjoint import root_vjp
from tritonimplicit.diff.implicit.call import RootCall
from tritonimplicit.diff.implicit.closures import warn_of_hidden_leaves
from tritonimplicit.linear_solve.solve import MaybeTensors, replace_at
from tritonimplicit.operators import Tensors


class Root(torch.autograd.Function):
    """(call, *tensors of the arguments) -> leaves of the solution."""

    @staticmethod
    def forward(call: RootCall, *tensors: Tensor) -> Tensors:
        """Run the solver; autograd has switched grad off."""
        given = {t.untyped_storage().data_ptr() for t in tensors}
        # An output that shares memory with an input would change with it, unseen by autograd.
        return tuple(
            t.clone() if t.untyped_storage().data_ptr() in given else t.detach()
            for t in call.run_solver(tensors)
        )

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Save through autograd, whose version counters notice a change in place."""
        call, *tensors = inputs
        ctx.call, ctx.n = call, len(output)  # type: ignore[attr-defined]
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        """Solve A^T u = -cotangents and pull u back into the arguments."""
        call, saved = ctx.call, ctx.saved_tensors
        x, args = saved[: ctx.n], saved[ctx.n :]
        wanted = zip(ctx.needs_input_grad[1:], call.differentiable, strict=True)
        wrt = [i for i, (needed, named) in enumerate(wanted) if needed and named]
        grads: MaybeTensors = (None,) * len(args)
        if wrt:
            pulled, jacobian = root_vjp(call.family, x, args, wrt, cotangents)
            if jacobian is not None:
                warn_of_hidden_leaves(jacobian.outputs, jacobian.leaves)
            grads = replace_at(grads, wrt, pulled)
        return (None, *grads)
