"""The autograd.Function of a root: the solver, with the implicit function theorem for rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritonimplicit.diff.implicit.adjoint import differentiable_root_vjp, root_jvp, root_vjp
from tritonimplicit.diff.implicit.arguments import PREFIX
from tritonimplicit.diff.implicit.call import RootProblem
from tritonimplicit.diff.implicit.closures import warn_of_hidden_leaves
from tritonimplicit.diff.implicit.gradients_aside import gradients_aside
from tritonimplicit.linear_solve.family import Dims
from tritonimplicit.linear_solve.solve import MaybeTensors, batch_first, replace_at
from tritonimplicit.operators import Tensors
from tritonimplicit.torch_internals import (
    forward_rule,
    in_trace,
    refuse_legacy_batched,
    transforms_active,
    untraced,
)


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
        init_count = problem.call.arguments.init_count
        fixed = [t for t in tensors[init_count:] if not t.is_inference()]
        versions = [t._version for t in fixed]
        guess = {id(t) for t in tensors[:init_count] if t.is_leaf}
        with gradients_aside([t for t in tensors[init_count:] if id(t) in guess]):
            solution, aux = problem.run(_without_graphs(tensors, guess))
        if [t._version for t in fixed] != versions:
            raise RuntimeError(
                f"{PREFIX} the solver changed an argument in place that the optimality depends on, "
                "so that its solution is not that of the arguments it was given. If the initial "
                "guess is also such an argument, pass a clone of it."
            )
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
        given = tensors[problem.call.arguments.init_count :]
        ctx.save_for_backward(*output[:n], *given)
        ctx.save_for_forward(*output[:n], *given)

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        """Solve A^T u = -cotangents and pull u back into the arguments."""
        refuse_legacy_batched(cotangents)
        problem, n, saved = ctx.problem, ctx.n, ctx.saved_tensors
        call, x, args, cotangents = problem.call, saved[:n], saved[n:], cotangents[:n]
        before = 1 + call.arguments.init_count  # inputs without a gradient
        named = call.arguments.differentiable
        needed = ctx.needs_input_grad[before:]
        wrt = [i for i in range(len(args)) if needed[i] and named[i]]
        grads: MaybeTensors = (None,) * len(args)
        if wrt:
            with call.autocast.off():
                grads = replace_at(grads, wrt, _pulled(problem, x, args, wrt, cotangents))
        return (*(None,) * before, *grads)

    @staticmethod
    @untraced
    @forward_rule
    def jvp(ctx: Any, saved: Tensors, _: None, *tangents: Tensor | None) -> MaybeTensors:
        """Solve A dx = -(d optimality / d args) dargs."""
        problem, n = ctx.problem, ctx.n
        call, x, args = problem.call, saved[:n], saved[n:]
        named, dots = call.arguments.differentiable, tangents[call.arguments.init_count :]
        wrt = [i for i, dot in enumerate(dots) if dot is not None and named[i]]
        if wrt:
            with call.autocast.off():
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
            for i in range(problem.call.arguments.init_count):
                if dims[i] is None:
                    moved[i], dims[i] = moved[i].expand(info.batch_size, *moved[i].shape), 0
        vmapped = problem.vmapped(tuple(None if dim is None else 0 for dim in dims))
        out: Tensors = Root.apply(vmapped, *moved)  # type: ignore[no-untyped-call]
        return out, (0,) * len(out)


def _without_graphs(tensors: Tensors, guess: set[int]) -> Tensors:
    """What the solver gets: a bare `backward()` in it shall add to no gradient outside.

    A leaf of the initial `guess` may be what an optimiser steps on, and stays itself. A parameter
    stays one, and a tensor that is given twice is one tensor.
    """
    detached: dict[int, Tensor] = {}
    for t in tensors:
        if t.requires_grad and id(t) not in guess:
            bare = t.detach()
            detached[id(t)] = (
                nn.Parameter(bare) if isinstance(t, nn.Parameter) else bare.requires_grad_()
            )
    return tuple(detached.get(id(t), t) for t in tensors)


def _pulled(
    problem: RootProblem, x: Tensors, args: Tensors, wrt: Sequence[int], cotangents: Tensors
) -> Tensors:
    """Return the cotangents of the args numbered by `wrt`, differentiable if that is asked for."""
    family, wording = problem.family, problem.call.wording
    if in_trace() or transforms_active():
        return differentiable_root_vjp(family, x, args, wrt, cotangents)
    with family.stream(x[0].device):
        jacobian = family.recorded(x, args, wrt)
        warn_of_hidden_leaves(jacobian.outputs, jacobian.leaves, wording)
        if not torch.is_grad_enabled():
            return root_vjp(family, jacobian, cotangents)
    return differentiable_root_vjp(family, x, args, wrt, cotangents)  # create_graph=True
