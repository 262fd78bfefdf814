"""`custom_fixed_point`: gives a fixed-point iteration the gradient of the point that it finds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonimplicit.diff.implicit.closures import Wording, wording_of
from tritonimplicit.diff.implicit.decorator import SolverFn, custom_root
from tritonimplicit.diff.implicit.pytrees import tree_leaves, tree_map, tree_structure
from tritonimplicit.operators import Solve
from tritonimplicit.torch_internals import transforms_active


def custom_fixed_point(
    fixed_point_fn: Callable[..., Any],
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    solve: Solve | None = None,
    *,
    argnames: str | Sequence[str] | None = None,
) -> Callable[[SolverFn], SolverFn]:
    """Decorate `solver_fn(init, *args) -> z`, which finds z with z = fixed_point_fn(z, *args).

    This is `custom_root` of z - fixed_point_fn(z, *args): arguments and errors are those of
    `custom_root`, with `fixed_point_fn(z, *args)` returning a pytree of z's structure and shapes.
    In the backward pass A = I - J^T, which `linear_solve.solve_inv(ns=True)` solves where J is a
    contraction.
    """
    wording = wording_of(fixed_point_fn, Wording("fixed_point_fn"))

    @functools.wraps(fixed_point_fn)
    def residual(z: Any, *args: Any, **kwargs: Any) -> Any:
        image = fixed_point_fn(z, *args, **kwargs)
        structure, expected = tree_structure(image), tree_structure(z)
        if structure != expected:
            raise TypeError(
                f"fixed_point_fn returned the structure {structure}; it must return that of the "
                f"solution, {expected}."
            )
        difference = tree_map(_difference, z, image)
        _check_recorded(z, image, wording)
        return difference

    residual.wording = wording  # type: ignore[attr-defined]
    return custom_root(residual, argnums, has_aux, solve, argnames=argnames)


def _check_recorded(z: Any, image: Any, wording: Wording) -> None:
    """Raise RuntimeError where autograd was to record the image and has not."""
    if not torch.is_grad_enabled() or transforms_active():
        return
    if _requires_grad(z) and not _requires_grad(image):
        raise RuntimeError(
            f"the result of {wording.subject} depends on none of its arguments through autograd: "
            "was it detached, or computed under torch.no_grad() or outside torch?"
        )


def _requires_grad(tree: Any) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(tree))


def _difference(z: Tensor, image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or image.shape != z.shape:  # which would broadcast
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"fixed_point_fn returned {got} for a solution of shape {tuple(z.shape)}: they must "
            "have the same shape."
        )
    return z - image
