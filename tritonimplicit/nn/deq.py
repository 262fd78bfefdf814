"""`DEQ`: a layer of infinite depth, with a gradient that does not depend on how it was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn

from tritonimplicit.diagnostics import ConvergenceError, TensorTree
from tritonimplicit.fixed_point import Anderson, FixedPointSolver
from tritonimplicit.linear_solve.iterative import IterativeSolver
from tritonimplicit.nn.correction import check_iterations
from tritonimplicit.nn.equilibrium import Equilibrium, Problem
from tritonimplicit.nn.fixed_layer import FixedLayer
from tritonimplicit.nn.gradients import Gradient, Implicit, Unrolled
from tritonimplicit.nn.warm_start import Starts, WarmStart
from tritonimplicit.torch_internals import transforms_active, untraced


class DEQ(nn.Module):
    """z = layer(z, x, *args): `z = deq(x, *args, z0=None)`, a tensor or a pytree of tensors.

    `layer` is a module, whose parameters are this module's, or a function without any. z0 is where
    the solver starts, zeros like x if it is not given; it has no gradient, so that an earlier z can
    be given as it is. `solver` finds z, by default each sample of a batch for itself; `gradient` is
    what autograd sees: `Implicit` (the default, exact), `SHINE`, `Phantom`, `JFB` or `Unrolled`.
    `warm_start` remembers the z of each sample, for calls with an `index`: see `WarmStart`.

    To autograd, and in all that the layer does to itself (running statistics, power iterations,
    random numbers), a forward pass is one evaluation of the layer, at z: dropout draws one mask,
    BatchNorm counts one batch. Where the layer has buffers and trains, that is one evaluation more.

    `deq.last` tells what became of the last pass: see `Equilibrium`. It holds tensors, and is left
    out of copies and pickles. A forward pass that does not converge does what `solver.on_failure`
    says, a backward pass what that of the linear solver says.

    Bai, Kolter and Koltun, "Deep equilibrium models", NeurIPS 2019.
    """

    last: Equilibrium

    def __init__(
        self,
        layer: Callable[..., TensorTree],
        *,
        solver: FixedPointSolver = Anderson(batch_ndim=1),  # noqa: B008, it is frozen
        gradient: Gradient = Implicit(),  # noqa: B008
        warm_start: WarmStart | None = None,
    ):
        super().__init__()
        if not callable(layer):
            raise TypeError(f"layer must be a function f(z, x), not a {type(layer).__name__}.")
        if not isinstance(solver, FixedPointSolver):
            raise TypeError(
                "solver must be one of tritonimplicit.fixed_point, such as Anderson(batch_ndim=1), "
                f"not {solver!r}."
            )
        if isinstance(gradient, type) or not hasattr(gradient, "equilibrium"):
            raise TypeError(
                f"gradient must be one of tritonimplicit.nn, such as Implicit(), not {gradient!r}."
            )
        if warm_start is not None:
            _check_warm_start(warm_start, gradient)
        self.layer, self.solver, self.gradient = layer, solver, gradient
        self.warm_start = warm_start
        self.last = Equilibrium()

    @untraced
    def forward(
        self,
        x: Any,
        *args: Any,
        z0: TensorTree | None = None,
        index: Tensor | None = None,
        corrections: Sequence[int] = (),
    ) -> TensorTree:
        """Return z, shaped as z0.

        `index` (B,) numbers the samples for `warm_start`. With `corrections`, numbers of
        iterations, the result is a tuple: for each of them f of the iterate that the solver had by
        then, with the gradient of that one evaluation, and z at the end; for
        `nn.fixed_point_correction`.

        Raises ValueError or TypeError if z0 is missing and zeros like x do not fit the layer, or x
        is empty, for an `index` that does not number the samples of z, and ConvergenceError if the
        solver is to raise it.
        """
        check_iterations(corrections)
        if corrections and isinstance(self.gradient, Unrolled):
            raise ValueError("corrections are of a solver's iterates, which Unrolled has not.")
        start: Any = _zeros_like(x) if z0 is None else optree.tree_map(Tensor.detach, z0)
        leaves = optree.tree_leaves(start)
        f = FixedLayer(self.layer, leaves[0].device if leaves else torch.device("cpu"))
        inputs = (x, *args)
        tensors = f.tensors(inputs)
        self.last = last = Equilibrium(_f=f, _tensors=_detached(tensors))
        starts = None
        if index is not None:
            start, starts = self._starts(index, start)
        problem = Problem(f, tensors, start, self.solver, last, starts, tuple(corrections))
        try:
            z = self.gradient.equilibrium(problem)
        except ConvergenceError:
            raise
        except (RuntimeError, ValueError) as error:
            if z0 is not None or f.evaluations > 1 or transforms_active():
                raise
            raise ValueError(
                f"the layer does not map zeros like x, of shape {tuple(x.shape)}, to that shape: "
                f"give the solver a start, deq(x, z0=...). ({error})"
            ) from error
        if starts is not None and last.forward is not None:
            starts.keep(last.forward)
        states = [f(iterate, tensors) for iterate in problem.iterates]
        f.settle(_detached(z), inputs)
        return (*states, z) if states else z

    def _starts(self, index: Tensor, z0: TensorTree) -> tuple[TensorTree, Starts]:
        if self.warm_start is None:
            raise ValueError(
                "index numbers samples for warm starts, which this DEQ has not: "
                "DEQ(layer, warm_start=WarmStart(number of samples))."
            )
        return self.warm_start.starts(index, z0)

    def __getstate__(self) -> dict[str, Any]:
        """Leave `last` out."""
        return {**self.__dict__, "last": Equilibrium()}

    def extra_repr(self) -> str:
        """The settings."""
        warm = "" if self.warm_start is None else f", warm_start={self.warm_start}"
        return f"solver={self.solver}, gradient={self.gradient}{warm}"


def _check_warm_start(warm_start: object, gradient: object) -> None:
    if not isinstance(warm_start, WarmStart):
        raise TypeError(f"warm_start must be a tritonimplicit.nn.WarmStart, not {warm_start!r}.")
    solve = getattr(gradient, "solve", None)
    if warm_start.adjoint and not isinstance(solve, IterativeSolver):
        raise TypeError(
            "WarmStart(adjoint=True) is for a gradient by an iterative solver, such as "
            f"Implicit(), not {gradient!r}."
        )


def _zeros_like(x: Any) -> Tensor:
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        got = f"tensor of dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"z cannot look like x, a {got}: give the solver a start, deq(x, z0=...).")
    if x.numel() == 0:
        raise ValueError(f"the batch is empty: x has shape {tuple(x.shape)}.")
    return torch.zeros_like(x)


def _detached(tree: Any) -> Any:
    return optree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tree)
