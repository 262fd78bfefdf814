"""The autograd.Function of a root: the solver, with the implicit function theorem for rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonimplicit.diff.implicit.adjoint import differentiable_root_vjp, root_jvp, root_vjp
from tritonimplicit.diff.implicit.call import RootProblem
from tritonimplicit.diff.implicit.closures import warn_of_hidden_leaves
from tritonimplicit.linear_solve.solve import Dims, MaybeTensors, batch_first, replace_at
from tritonimplicit.operators import Jacobian, Tensors
from tritonimplicit.torch_internals import forward_rule, in_trace, transforms_active, untraced


class Root(torch.autograd.Function):
    """(problem, *tensors of the arguments) -> leaves of the solution, tensor leaves of aux.

    With a jvp and a vmap rule, `forward` always runs on plain tensors, whatever the transforms.
    """

    @staticmethod
    @untraced
    def forward(problem: RootProblem, *tensors: Tensor) -> Tensors:
        """Run the solver; autograd has switched grad off."""
        if in_trace():
            return problem.trace(tensors)
        solution, aux = problem.run(tensors)
        problem.call.solution_count = len(solution)
        given = {t.untyped_storage().data_ptr() for t in tensors}
        # An output that shares memory with an input would change with it, unseen by autograd.
        separate = (
            t.clone() if t.untyped_storage().data_ptr() in given else t.detach() for t in solution
        )
        return (*separate, *(t.detach() for t in aux))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Save through autograd, whose version counters notice a change in place."""
        problem, *tensors = inputs
        n = problem.call.solution_count
        ctx.problem, ctx.n, ctx.aux_count = problem, n, len(output) - n
        ctx.mark_non_differentiable(*output[n:])
        given = tensors[problem.call.init_count :]
        ctx.save_for_backward(*output[:n], *given)
        ctx.save_for_forward(*output[:n], *given)

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        """Solve A^T u = -cotangents and pull u back into the arguments."""
        problem, n, saved = ctx.problem, ctx.n, ctx.saved_tensors
        x, args, cotangents = saved[:n], saved[n:], cotangents[:n]
        before = 1 + problem.call.init_count  # inputs without a gradient
        wanted = zip(ctx.needs_input_grad[before:], problem.call.differentiable, strict=True)
        wrt = [i for i, (needed, named) in enumerate(wanted) if needed and named]
        grads: MaybeTensors = (None,) * len(args)
        if not wrt:
            return (*(None,) * before, *grads)
        family = problem.family
        if in_trace() or transforms_active():
            pulled = differentiable_root_vjp(family, x, args, wrt, cotangents)
        else:
            jacobian = Jacobian(family.fn, x, args, wrt)
            warn_of_hidden_leaves(jacobian.outputs, jacobian.leaves)
            if torch.is_grad_enabled():  # create_graph=True
                pulled = differentiable_root_vjp(family, x, args, wrt, cotangents)
            else:
                pulled = root_vjp(family, jacobian, cotangents)
        return (*(None,) * before, *replace_at(grads, wrt, pulled))

    @staticmethod
    @untraced
    @forward_rule
    def jvp(ctx: Any, saved: Tensors, _: None, *tangents: Tensor | None) -> MaybeTensors:
        """Solve A dx = -(d optimality / d args) dargs."""
        problem, n = ctx.problem, ctx.n
        x, args = saved[:n], saved[n:]
        named, dots = problem.call.differentiable, tangents[problem.call.init_count :]
        wrt = [i for i, dot in enumerate(dots) if dot is not None and named[i]]
        if wrt:
            dx = root_jvp(problem.family, x, args, wrt, [dots[i] for i in wrt])  # type: ignore[misc]
        else:
            dx = tuple(torch.zeros_like(t) for t in x)
        return (*dx, *(None,) * ctx.aux_count)

    @staticmethod
    @untraced
    def vmap(
        info: Any, in_dims: Dims, problem: RootProblem, *tensors: Tensor
    ) -> tuple[Tensors, Dims]:
        """Run the solver vmapped; its gradient is one batched solve."""
        moved, dims = batch_first(tensors, in_dims[1:]), list(in_dims[1:])
        if in_trace():  # the solution's shapes are read off the initial guess
            for i in range(problem.call.init_count):
                if dims[i] is None:
                    moved[i], dims[i] = moved[i].expand(info.batch_size, *moved[i].shape), 0
        vmapped = problem.vmapped(tuple(None if dim is None else 0 for dim in dims))
        out: Tensors = Root.apply(vmapped, *moved)  # type: ignore[no-untyped-call]
        return out, (0,) * len(out)
