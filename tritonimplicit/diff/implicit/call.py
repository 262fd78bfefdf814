"""One call of a decorated solver, taken apart into tensors for autograd and everything else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from tritonimplicit.linear_solve.base import Solve
from tritonimplicit.linear_solve.solve import Dims, LinearFamily, MaybeTensors, replace_at
from tritonimplicit.opaque import opaque_call
from tritonimplicit.operators import Tensors
from tritonimplicit.torch_internals import transforms_active

PREFIX = "custom_root(optimality_fn)(solver_fn)(*args):"


@dataclass(frozen=True)
class RootProblem:
    """A root as `Root` sees it: `run` finds it, `family` is what it depends on; may be vmapped."""

    call: RootCall
    family: LinearFamily
    run: Callable[[Tensors], tuple[Tensors, Tensors]]

    def vmapped(self, dims: Dims) -> RootProblem:
        """Return the problem over a new leading dimension of the tensors whose dim is not None."""
        run = torch.vmap(self.run, in_dims=(dims,), randomness="different")
        return RootProblem(self.call, self.family.vmapped(dims[self.call.init_count :]), run)

    def trace(self, tensors: Tensors) -> Tensors:
        """Put the solver into the graph that torch.compile is tracing."""
        self.call.expect_solution_like_init()
        n = self.call.solution_count
        return opaque_call(lambda ts: self.run(tuple(ts))[0], lambda ts: ts[:n], tensors)


class RootCall:
    """The arguments of a call as a flat list of leaves, and how to run solver and optimality on it.

    `tensors` are the tensor leaves of all arguments; the first `init_count` of them are those of
    the initial guess, which no derivative needs. `differentiable` says for each of the others
    whether it belongs to an argument in argnums.
    """

    def __init__(
        self,
        solver_fn: Callable[..., Any],
        optimality_fn: Callable[..., Any],
        solve: Solve,
        argnums: Sequence[int],
        has_aux: bool,
        bound: inspect.BoundArguments,
    ):
        self._solver_fn, self._optimality_fn, self._has_aux = solver_fn, optimality_fn, has_aux
        arguments: Any = (bound.args, bound.kwargs)
        leaves, self._spec = optree.tree_flatten(arguments, none_is_leaf=True)
        self._where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors: Tensors = tuple(leaves[i] for i in self._where)
        self._static = replace_at(leaves, self._where, [None] * len(self._where))
        init: Any = bound.args[0] if bound.args else None
        init_leaves, self._init_spec = optree.tree_flatten(init)
        self._init_is_tensors = all(isinstance(leaf, Tensor) for leaf in init_leaves)
        self.init_count = sum(isinstance(leaf, Tensor) for leaf in init_leaves)
        self.differentiable = self._mark(bound.args, argnums)[self.init_count :]
        self.problem = RootProblem(self, LinearFamily(self._residual, solve), self._run)
        self.solution_count = 0
        self._aux: Any = None

    def expect_solution_like_init(self) -> None:
        """Take the initial guess for what the solution looks like, where the solver cannot run."""
        if self._has_aux or not self.init_count or not self._init_is_tensors:
            raise NotImplementedError(
                f"{PREFIX} under torch.compile the initial guess must be a pytree of tensors that "
                "looks like the solution, and has_aux is not possible."
            )
        self._solution_spec, self.solution_count = self._init_spec, self.init_count

    def result(self, outputs: Tensors) -> Any:
        """Return what the caller gets: the solution in its structure, and aux if there is one."""
        n = self.solution_count
        tree = optree.tree_unflatten(self._solution_spec, outputs[:n])
        if not self._has_aux:
            return tree
        if not transforms_active():
            aux, self._aux = self._aux, None  # the very object, which the graph need not keep
            return tree, aux
        leaves, spec = optree.tree_flatten(self._aux, none_is_leaf=True)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return tree, optree.tree_unflatten(spec, replace_at(leaves, where, outputs[n:]))

    def _run(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """Return the leaves of the solution and the tensors of aux.

        Raises RuntimeError for a result that is no solution.
        """
        args, kwargs = self._rebuild(tensors)
        output = self._solver_fn(*args, **kwargs)
        if self._has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                raise RuntimeError(
                    f"{PREFIX} output of function solver_fn should be a tuple: (output, aux) if "
                    f"has_aux is True. Got {output!r}"
                )
            output, self._aux = output
        leaves, self._solution_spec = optree.tree_flatten(output)
        usable = all(isinstance(t, Tensor) and t.is_floating_point() for t in leaves)
        if not leaves or not usable:
            raise RuntimeError(
                f"{PREFIX} output of function solver_fn should be a torch.Tensor or a pytree of "
                f"torch.Tensor, of floating point dtype. Got {output!r}"
            )
        aux = optree.tree_leaves(self._aux)
        return tuple(leaves), tuple(leaf for leaf in aux if isinstance(leaf, Tensor))

    def _residual(self, x: Tensors, tensors: Tensors) -> Tensors:
        """optimality_fn at x, on the flat tensors of all arguments but the initial guess."""
        args, kwargs = self._rebuild((*(None,) * self.init_count, *tensors))
        tree = optree.tree_unflatten(self._solution_spec, x)
        leaves, spec = optree.tree_flatten(self._optimality_fn(tree, *args[1:], **kwargs))
        if spec != self._solution_spec:
            raise TypeError(
                f"optimality_fn returned the structure {spec}; it must return that of the "
                f"solution, {self._solution_spec}."
            )
        for leaf, like in zip(leaves, x, strict=True):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"optimality_fn must return floating point tensors, not {got}.")
            if leaf.shape != like.shape:
                raise ValueError(
                    f"optimality_fn returned a tensor of shape {tuple(leaf.shape)} for a solution "
                    f"of shape {tuple(like.shape)}: the residual must have its shapes."
                )
        return tuple(leaf.to(like.dtype) for leaf, like in zip(leaves, x, strict=True))

    def _rebuild(self, tensors: MaybeTensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = replace_at(self._static, self._where, tensors)
        arguments: Any = optree.tree_unflatten(self._spec, leaves)
        args, kwargs = arguments
        return args, kwargs

    def _mark(self, args: tuple[Any, ...], argnums: Sequence[int]) -> tuple[bool, ...]:
        """Which of `tensors` lie in an argument of argnums; their leaves come in argument order."""
        marks: list[bool] = []
        for position, arg in enumerate(args):
            leaves = optree.tree_leaves(arg, none_is_leaf=True)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if position in argnums and not any(t.is_floating_point() for t in tensors):
                raise RuntimeError(
                    f"{PREFIX} argument of function solver_fn specified with `argnums` should be a "
                    f"torch.Tensor or a pytree of torch.Tensor; argument {position} is a "
                    f"{type(arg).__name__} without floating point tensors."
                )
            marks += [position in argnums] * len(tensors)
        if max(argnums) >= len(args):
            raise RuntimeError(
                f"{PREFIX} argnums={tuple(argnums)}, but solver_fn was called with "
                f"{len(args)} positional arguments (counting from 0)."
            )
        return (*marks, *[False] * (len(self.tensors) - len(marks)))
