"""One call of a decorated solver, and its root as a problem of flat tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonimplicit.diagnostics import callers_level
from tritonimplicit.diff.implicit.arguments import PREFIX, Arguments
from tritonimplicit.diff.implicit.autocast import AutocastState
from tritonimplicit.diff.implicit.closures import HiddenTransforms, Wording, wording_of
from tritonimplicit.diff.implicit.pytrees import (
    HOW_TO_REGISTER,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from tritonimplicit.linear_solve.family import Dims, LinearFamily
from tritonimplicit.linear_solve.solve import MaybeTensors, replace_at
from tritonimplicit.opaque import opaque_call
from tritonimplicit.operators import Solve, Tensors
from tritonimplicit.random_numbers import random_states
from tritonimplicit.torch_internals import in_trace, transforms_active


@dataclass(frozen=True)
class RootProblem:
    """A root as `Root` sees it: `run` finds it, `family` is what it depends on; may be vmapped."""

    call: RootCall
    family: LinearFamily
    run: Callable[[Tensors], tuple[Tensors, Tensors]]

    @classmethod
    def of(cls, call: RootCall, solve: Solve, symmetric: bool) -> RootProblem:
        """Return the problem of a call; the call must not hold it, or both wait for the gc.

        `symmetric`: the optimality is known to be a gradient.
        """
        return cls(call, LinearFamily(call.residual, solve, symmetric=symmetric), call.run)

    def vmapped(self, dims: Dims) -> RootProblem:
        """Return the problem over a new leading dimension of the tensors whose dim is not None."""
        run = torch.vmap(self.run, in_dims=(dims,), randomness="different")
        family = self.family.vmapped(dims[self.call.arguments.init_count :])
        return RootProblem(self.call, family, run)

    def trace(self, tensors: Tensors) -> Tensors:
        """Put the solver into the graph that torch.compile is tracing."""
        self.call.expect_solution_like(tensors)
        n = self.call.solution_count
        return opaque_call(lambda ts: self.run(tuple(ts))[0], lambda ts: ts[:n], tensors)


class RootCall:
    """How to run solver and optimality on the flat tensors of a call, of which this holds none."""

    def __init__(
        self,
        solver_fn: Callable[..., Any],
        optimality_fn: Callable[..., Any],
        arguments: Arguments,
        autocast: AutocastState,
        has_aux: bool,
    ):
        self._solver_fn, self._optimality_fn, self._has_aux = solver_fn, optimality_fn, has_aux
        self.arguments, self.autocast = arguments, autocast
        self.wording = wording_of(optimality_fn)
        self.solution_count = 0
        self._aux: Any = None
        self._transformed = transforms_active()

    def expect_solution_like(self, tensors: Tensors) -> None:
        """Take the initial guess for what the solution looks like, where the solver cannot run."""
        args, _ = self.arguments.build(tensors)
        leaves, self._solution_spec = tree_flatten(args[0] if args else None)
        self.solution_count = len(leaves)
        if self._has_aux or not leaves or self.solution_count != self.arguments.init_count:
            raise NotImplementedError(
                f"{PREFIX} under torch.compile the initial guess must be a pytree of tensors that "
                "looks like the solution, and has_aux is not possible."
            )

    def result(self, outputs: Tensors) -> Any:
        """Return what the caller gets: the solution in its structure, and aux if there is one."""
        n = self.solution_count
        tree = tree_unflatten(self._solution_spec, outputs[:n])
        if not self._has_aux:
            return tree
        aux, self._aux = self._aux, None  # the graph need not keep it
        if not transforms_active():
            return tree, aux
        leaves, spec = tree_flatten(aux, none_is_leaf=True)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return tree, tree_unflatten(spec, replace_at(leaves, where, outputs[n:]))

    def run(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """Return the leaves of the solution and the tensors of aux.

        Raises RuntimeError for a result that is no solution.
        """
        args, kwargs = self.arguments.build(tensors)
        with HiddenTransforms() if self._transformed else contextlib.nullcontext():
            output = self._solver_fn(*args, **kwargs)
        if self._has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                raise RuntimeError(
                    f"{PREFIX} output of function solver_fn should be a tuple: (output, aux) if "
                    f"has_aux is True. Got {output!r}"
                )
            output, self._aux = output
        leaves, self._solution_spec = tree_flatten(output)
        usable = all(isinstance(t, Tensor) and t.is_floating_point() for t in leaves)
        if not leaves or not usable:
            raise RuntimeError(
                f"{PREFIX} output of function solver_fn should be a torch.Tensor or a pytree of "
                f"torch.Tensor, of floating point dtype (a class of your own becomes one by "
                f"{HOW_TO_REGISTER}). Got {output!r}"
            )
        aux = tree_leaves(self._aux)
        return tuple(leaves), tuple(leaf for leaf in aux if isinstance(leaf, Tensor))

    def residual(self, x: Tensors, tensors: Tensors) -> Tensors:
        """optimality_fn at x, on the flat tensors of all arguments but the initial guess."""
        given: MaybeTensors = (*(None,) * self.arguments.init_count, *tensors)
        args, kwargs = self.arguments.build(given)
        tree = tree_unflatten(self._solution_spec, x)
        device = x[0].device
        unseen = in_trace() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        before = None if unseen else random_states(device)
        with self.autocast.again():
            residual = self._optimality_fn(tree, *args[1:], **kwargs)
        if before is not None:
            _warn_of_random_numbers(before, device, self.wording)
        leaves, spec = tree_flatten(residual)
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


def _warn_of_random_numbers(before: list[Tensor], device: torch.device, wording: Wording) -> None:
    """Warn if the generators have moved: the solver has seen other numbers, so another function."""
    if not all(map(torch.equal, before, random_states(device))):
        warnings.warn(
            f"{wording.subject} draws random numbers (dropout in training, for one). If its value "
            "depends on them, the backward pass has another function than the solver had, and the "
            "gradient is wrong: draw them before the solve and give them as an argument, or call "
            "eval(). "
            "tritonimplicit.nn.DEQ draws one mask for both passes.",
            UserWarning,
            stacklevel=callers_level(),
        )
