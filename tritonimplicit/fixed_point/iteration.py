"""What the iterations of fixed points share: evaluate f, judge, freeze, keep the best."""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.linear_solve.plain import advance, record
from tritonimplicit.linear_solve.progress import Progress
from tritonimplicit.linear_solve.rows import RowMatvec

if TYPE_CHECKING:
    from tritonimplicit.fixed_point.base import FixedPointSolver


class Evaluations(RowMatvec):
    """f on rows, which keeps its last image, to be read only."""

    _image: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """f(v)."""
        self._image = None  # not beside the next one
        self._image = image = super().__call__(v)
        return image

    @property
    def image(self) -> Tensor:
        """What the last evaluation has returned."""
        assert self._image is not None  # an iteration begins with one
        return self._image

    def _hidden_derivative(self) -> RuntimeError:
        return unseen_derivative()


def unseen_derivative() -> RuntimeError:
    """The error of a z0, or of f's result, that is being differentiated or vmapped."""
    return RuntimeError(
        "a fixed-point solver cannot see through a torch.func transform, or forward-mode AD. "
        "In the place of vmap, give a batch and batch_ndim; for a derivative, call it in a "
        "function decorated by tritonimplicit.custom_fixed_point, with what f depends on as "
        "arguments."
    )


class Iteration(abc.ABC):
    """z (B, ld) and residual f(z) - z; `best` has had the least residual norm, `best_norm` (B,).

    A step costs one evaluation of f, and every residual is the true one of its z. The vectors of a
    frozen sample other than z may turn to anything.
    """

    def __init__(self, solver: FixedPointSolver, f: Evaluations, z: Tensor):
        self._solver, self._f, self.z = solver, f, z
        dtypes = f.layout.dtypes
        self._eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        self._rounds = any(dtype is not z.dtype for dtype in dtypes)
        norm, tolerance = self._evaluate()
        self.progress = Progress(norm, tolerance, partials=1)
        self.best = z.clone()
        self.best_norm = torch.where(norm.isfinite(), norm, math.inf)

    def step(self) -> None:
        """Move the samples that run, and evaluate f."""
        state = self.progress
        advances = advance(state, self._solver.maxiter)
        self._move(advances)
        norm, tolerance = self._evaluate()
        record(state, advances, norm.square())
        state.threshold = torch.where(advances, tolerance.square(), state.threshold)
        better = advances & (norm < self.best_norm)
        torch.where(better[:, None], self.z, self.best, out=self.best)
        self.best_norm = torch.where(better, norm, self.best_norm)

    def before_capture(self, steps: int) -> None:  # noqa: B027
        """Do nothing: the iterations of fixed points run in no graph."""

    def captured(self) -> None:  # noqa: B027
        """Do nothing: the iterations of fixed points run in no graph."""

    @abc.abstractmethod
    def _move(self, advances: Tensor) -> None:
        """Bring z to the next iterate of the samples that advance (B,), rounded as f sees it."""

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """Bring the residual up to date; return its norm and the tolerance, (B,) float64."""
        image = self._f(self.z)
        self.residual = image - self.z
        return kernels.row_norms(self.residual), self._tolerance(kernels.row_norms(image))

    def _tolerance(self, image_norm: Tensor) -> Tensor:
        """(B,) the residual norm at or below which a sample has converged, from ‖f(z)‖."""
        return (max(self._solver.rtol, self._eps) * image_norm).clamp(min=self._solver.atol)

    def _rounded(self, z: Tensor) -> Tensor:
        """z as f sees it, so that the residual is that of the value that is returned."""
        if not self._rounds:
            return z
        layout = self._f.layout
        return layout.flatten(layout.unflatten(z), "z")


class Successive(Iteration):
    """An iteration whose next z is a new tensor."""

    def _move(self, advances: Tensor) -> None:
        self.z = torch.where(advances[:, None], self._next(), self.z)

    @abc.abstractmethod
    def _next(self) -> Tensor:
        """The next z (B, ld), from `z` and `residual`, rounded as f sees it."""
