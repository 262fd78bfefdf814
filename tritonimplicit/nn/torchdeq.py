"""Solvers for torchdeq, in the form that its registry takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import (
    Solution,
    Status,
    TensorTree,
    report_failures,
    statuses_in,
)
from tritonimplicit.fixed_point import FixedPointSolver
from tritonimplicit.fixed_point.base import Map
from tritonimplicit.fixed_point.iterates import Iterates
from tritonimplicit.linear_solve import NormalCG
from tritonimplicit.linear_solve.base import check_choice
from tritonimplicit.linear_solve.iterative import IterativeSolver
from tritonimplicit.vectors import beside

Answer: TypeAlias = tuple[TensorTree, list[TensorTree], dict[str, Tensor]]
"""The fixed point, the iterates that were asked for, and torchdeq's statistics."""

_TOLD_BY = "torchdeq's info (of a backward pass: its backward_writer)"


def torchdeq_solver(solver: FixedPointSolver | IterativeSolver) -> Callable[..., Answer]:
    """Return `solver` as a function for `torchdeq.solver.register_solver(name, function)`.

    A fixed-point solver can be torchdeq's `f_solver` or `b_solver`; a linear solver, such as
    `GMRES(batch_ndim=1)`, its `b_solver`, whose map y -> J^T y + g is affine: it takes one vjp to
    ask for g, and one to see that the map is affine. torchdeq's max_iter, tol and stop_mode ("abs",
    or "rel", which for a linear solver is relative to ‖g‖) take the places of maxiter, atol and
    rtol; the other fields are the solver's. Where that does not converge, `on_failure` says what
    happens.

    Of torchdeq's statistics, abs_lowest, rel_lowest (relative to ‖z‖) and nstep are those of the
    result, the traces have that one entry; "status" is added. With batch_ndim=0 they are the whole
    batch's. Written against torchdeq 0.1.0.

    The function raises RuntimeError where a linear solver is given a map that is not affine, and
    ValueError where it is asked for iterates, of which a linear solver has none.
    """
    if not isinstance(solver, (FixedPointSolver, IterativeSolver)):
        raise TypeError(
            "solver must be one of tritonimplicit.fixed_point, or an iterative one of "
            f"tritonimplicit.linear_solve, not {solver!r}."
        )
    if isinstance(solver, NormalCG):
        raise TypeError(
            "NormalCG needs the transpose of the matrix, which torchdeq's map y -> J^T y + g has "
            "not: use solve_gmres(batch_ndim=1)."
        )

    def solve(
        func: Map,
        x0: TensorTree,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[int] | None = None,
    ) -> Answer:
        check_choice("stop_mode", stop_mode, ("abs", "rel"))
        if indexing and not isinstance(solver, FixedPointSolver):
            raise ValueError(
                f"{type(solver).__name__} is a linear solver, which has no iterates to return by "
                "indexing: use it as b_solver, and give f_solver one of tritonimplicit.fixed_point."
            )
        rtol, atol = (tol, 0.0) if stop_mode == "rel" else (0.0, tol)
        own = dataclasses.replace(solver, maxiter=int(max_iter), rtol=rtol, atol=atol)
        f = Iterates(_keeping_structure(func, x0), indexing or ())
        if isinstance(own, FixedPointSolver):
            solution = own.solve(f, x0)
            own.report(solution, _TOLD_BY)
        else:
            solution = _solve_affine(own, f, x0)
        z = solution.value
        states = [z if k >= max_iter else f.after(k, z) for k in indexing or ()]
        return z, states, _statistics(solution)

    return solve


def _keeping_structure(func: Map, x0: TensorTree) -> Map:
    """`func`, whose result may be a tuple where x0 is a list."""
    spec = optree.tree_structure(x0)
    return lambda z: optree.tree_unflatten(spec, optree.tree_leaves(func(z)))


def _solve_affine(solver: IterativeSolver, f: Map, x0: TensorTree) -> Solution:
    """Solve y = J^T y + g, given the right hand side as a function of y."""
    g = optree.tree_map(Tensor.detach, f(optree.tree_map(torch.zeros_like, x0)))
    size, batch_ndim = _largest(g, solver.batch_ndim), solver.batch_ndim

    def matvec(v: TensorTree) -> TensorTree:
        # Asked about v in g's size, so that rounding f does not drown J^T v in g.
        ratio = size / _largest(v, batch_ndim)
        scale = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)

        def scaled(leaf: Tensor) -> Tensor:
            return leaf * _along(scale, leaf)

        def without_g(v: Tensor, image: Tensor, g: Tensor) -> Tensor:
            return v - (image - g) / _along(scale, v)

        return optree.tree_map(without_g, v, f(optree.tree_map(scaled, v)), g)

    solution = solver.solve(matvec, g)
    _check_affine(solution, f, batch_ndim)
    free = solver.rtol == 0 and solver.atol == 0
    expected = frozenset({Status.MAX_ITERATIONS, Status.STAGNATED} if free else ())
    if solver.on_failure != "ignore":
        present = statuses_in(solution.status)
        report_failures(solution, present, expected, solver.on_failure, told_by=_TOLD_BY)
    return solution


def _check_affine(solution: Solution, f: Map, batch_ndim: int) -> None:
    z = solution.value
    miss = _norms(optree.tree_map(torch.sub, f(z), z), batch_ndim)
    eps = max(torch.finfo(leaf.dtype).eps for leaf in optree.tree_leaves(z))
    # The solver's own residual, and the roundings of a layer.
    slack = 2 * solution.residual_norm + 100 * eps * _norms(z, batch_ndim)
    claims = solution.status <= Status.STAGNATED
    if bool((claims & solution.residual_norm.isfinite() & ~(miss <= slack)).any()):
        raise RuntimeError(
            "a linear solver found the map y -> f(y) not affine: it can be a b_solver; give "
            "f_solver one of tritonimplicit.fixed_point. (Or f mixes the samples of a batch: give "
            "fewer batch_ndim.)"
        )


def _norms(tree: TensorTree, batch_ndim: int) -> Tensor:
    """Of each system, float64 of the batch's shape."""
    squares = [
        leaf.double().square().reshape(*leaf.shape[:batch_ndim], -1).sum(-1)
        for leaf in optree.tree_leaves(tree)
    ]
    return torch.stack(squares).sum(0).sqrt()


def _largest(tree: TensorTree, batch_ndim: int) -> Tensor:
    """The largest |element| of each system, of the batch's shape."""
    leaves = optree.tree_leaves(tree)
    sizes = [leaf.abs().reshape(*leaf.shape[:batch_ndim], -1).amax(-1) for leaf in leaves]
    return torch.stack(sizes).amax(0)


def _along(values: Tensor, leaf: Tensor) -> Tensor:
    """Values of the batch's shape, to multiply a leaf with."""
    return beside(values, leaf).to(leaf.dtype)


def _statistics(solution: Solution) -> dict[str, Tensor]:
    leaves = optree.tree_leaves(solution.value)
    samples = leaves[0].shape[0] if leaves[0].ndim else 1
    norm = _norms(solution.value, solution.status.ndim)

    def of_samples(values: Tensor) -> Tensor:
        return values.expand(samples) if values.ndim == 0 else values.flatten()

    dtype = leaves[0].dtype
    absolute = of_samples(solution.residual_norm).to(dtype)
    relative = of_samples(solution.residual_norm / norm.clamp(min=1e-300)).to(dtype)
    return {
        "abs_lowest": absolute,
        "rel_lowest": relative,
        "abs_trace": absolute[:, None],
        "rel_trace": relative[:, None],
        "nstep": of_samples(solution.iterations).to(dtype),
        "sradius": absolute.new_full((1,), -1.0),
        "status": of_samples(solution.status),
    }
