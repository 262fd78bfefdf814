"""What keeps deep equilibrium models solvable: the size of df/dz, told and penalised."""

from __future__ import annotations

from collections.abc import Callable

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import check_count
from tritonimplicit.linear_solve.plain import normalised
from tritonimplicit.linear_solve.probes import orthonormal, repeated
from tritonimplicit.operators import Jacobian, Tensors
from tritonimplicit.vectors import Layout


def jacobian_penalty(f: Callable[[TensorTree], TensorTree], z: TensorTree) -> Tensor:
    """Estimate ‖df/dz‖² / n at z, Frobenius, n elements of z: ‖J^T v‖² / n for one Gaussian v.

    To be added to a loss, times a weight; for samples that f does not mix it is the mean of theirs.
    Differentiable in what f depends on; z is taken for constant. One evaluation of f, one vjp and
    its gradient.

    Hutchinson's estimator; Bai, Koltun and Kolter, "Stabilizing equilibrium models by Jacobian
    regularization", ICML 2021.
    """
    leaves, spec = optree.tree_flatten(z)
    points = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        images = optree.tree_leaves(f(optree.tree_unflatten(spec, points)))
        probes = [torch.randn_like(image) for image in images]
        pulled = torch.autograd.grad(images, points, probes, create_graph=True)
        return sum((t.square().sum() for t in pulled), start=pulled[0].new_zeros(())) / sum(
            t.numel() for t in pulled
        )


def spectral_radius(
    f: Callable[[TensorTree], TensorTree], z: TensorTree, *, steps: int = 30, batch_ndim: int = 1
) -> Tensor:
    """Estimate the largest |eigenvalue| of df/dz at z, for each sample: one evaluation, vjps.

    The leading `batch_ndim` dimensions of every leaf index samples, which f must not mix. Power
    iteration on J^T; the estimate, float64 of the batch's shape, is the mean growth of the vector
    in the second half of the steps, which pairs of complex eigenvalues come to as well. Iterations
    z <- f(z) converge near z where it is below 1. Raises as `Layout.of`, and ValueError for fewer
    than 2 steps.
    """
    check_count("steps", steps)
    if steps < 2:
        raise ValueError(f"steps must be at least 2, not {steps}.")
    layout = Layout.of(z, batch_ndim, "z")
    leaves, spec = optree.tree_flatten(z)

    def image(point: Tensors, _: Tensors) -> Tensors:
        return tuple(layout.leaves_of(f(optree.tree_unflatten(spec, point)), "the result of f"))

    transposed = Jacobian(image, tuple(leaves), may_be_zero=True).T
    v, growth = repeated(orthonormal(layout, 1, seed=0)[0], layout), []
    for _ in range(steps):
        moved = transposed(tuple(optree.tree_leaves(layout.unflatten(v))))
        v, norm = normalised(layout.flatten(optree.tree_unflatten(spec, list(moved)), "J^T v"))
        growth.append(norm)
    return layout.per_system(torch.stack(growth[steps // 2 :]).log().mean(0).exp())
