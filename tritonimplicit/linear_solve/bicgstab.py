"""BiCGSTAB, for any nonsingular system, in the memory of a few vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import build
from tritonimplicit.linear_solve.iterative import FusedSolver
from tritonimplicit.linear_solve.loop import Recurrence, solve_and_verify
from tritonimplicit.linear_solve.plain import RowFunction, normalised
from tritonimplicit.linear_solve.preconditioners import row_preconditioner
from tritonimplicit.linear_solve.progress import Progress
from tritonimplicit.linear_solve.rows import RowMatvec, RowSolution
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout


@dataclass(frozen=True, kw_only=True)
class BiCGSTAB(FusedSolver):
    """BiCGSTAB, for any nonsingular A; (A + ridge I) x = b. Two matvecs an iteration, 7 vectors.

    Four launches an iteration, with a preconditioner or without. Where a denominator vanishes, the
    method begins again with the residual as shadow residual; if that does not help, it is a
    BREAKDOWN. `M`, any approximation of the inverse of A, preconditions from the right, so that
    residuals are those of A x = b.

    van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of
    nonsymmetric linear systems", SIAM J. Sci. Stat. Comput. 13, 1992.
    """

    def _solve_rows(self, matvec: Matvec, b: TensorTree, layout: Layout) -> RowSolution:
        apply = RowMatvec(matvec, layout, self._ridge_rows(layout))
        precondition = row_preconditioner(self.M, apply)
        rhs = layout.gather(b, "b")
        return solve_and_verify(self, _BiCGSTAB(self, apply, rhs, precondition))


class _BiCGSTAB(Recurrence):
    """All vectors but x are in units of the residual norm at the start: products with A stay small.

    The names are van der Vorst's; `shadow` is his r hat, and s lies where r was.
    """

    products = 2

    def __init__(
        self, solver: BiCGSTAB, apply: RowMatvec, b: Tensor, precondition: RowFunction | None
    ):
        self.apply, self.b = apply, b
        self._maxiter = solver.iteration_limit(apply.layout)
        self._backend = solver.backend_for(apply, b)
        self._product = _Twice(apply)
        self._preconditioner = None if precondition is None else _Twice(precondition)
        b_norm = kernels.row_norms(b)
        self.x, self._r, norm = solver.start(apply, b, b_norm)
        partials = self._backend.partial_count(b.shape[1])
        self.progress = Progress(norm, solver.tolerance(b_norm, b.dtype), partials)
        # Beyond a growth of 1/eps no digit of the start is left.
        self._limit = (norm / torch.finfo(b.dtype).eps).square()
        self._p, self._shadow = torch.empty_like(b), torch.empty_like(b)
        self._unit, self._rho, self._alpha = norm.new_zeros(3, len(norm))
        self._shadow_dots = norm.new_empty(3, len(norm), partials)
        self._ss = norm.new_empty(len(norm), partials)
        self._half_dots = norm.new_empty(4, len(norm), partials)
        self._begin(self._r)

    def step(self) -> None:
        state, p, r, shadow = self.progress, self._p, self._r, self._shadow
        M = self._preconditioner
        (y,) = [p] if M is None else M.first(p)
        v_parts = self._product.first(y)
        v = self.apply.joined(v_parts)
        self._backend.bicgstab_dots(shadow, v, state.state, self._shadow_dots)
        self._backend.bicgstab_half_step(
            r,
            v,
            self._shadow_dots,
            self._rho,
            state.rr,
            state.state,
            state.threshold,
            self._limit,
            self._maxiter,
            self._alpha,
            self._ss,
            state.state_out,
            state.residual_sq,
        )
        (z,) = [r] if M is None else M.second(r)
        t_parts = self._product.second(z)
        t = self.apply.joined(t_parts)
        self._backend.bicgstab_half_dots(shadow, r, t, state.state_out, self._half_dots)
        sums = self._shadow_dots, self._ss, self._half_dots
        scalars = self._alpha, self._unit, state.threshold, state.state_out, self._rho, state.rr_out
        if M is None:
            self._backend.bicgstab_step(self.x, r, p, shadow, v, t, *sums, *scalars)
        else:
            self._backend.pbicgstab_step(self.x, r, p, shadow, y, z, v, t, *sums, *scalars)

    def restart(self, again: Tensor, residual: Tensor) -> None:
        # All begin again, those that are frozen for nothing.
        self._begin(residual)

    def _begin(self, residual: Tensor) -> None:
        direction, norm = normalised(residual)
        for v in (self._r, self._p, self._shadow):
            v.copy_(direction)
        self._unit.copy_(norm)
        self._rho.zero_()  # a fresh start


class _Twice:
    """A map that is called twice an iteration, such that its first result outlives the second.

    A result is the tensors that it lies in, as of `RowMatvec.parts`; other maps return rows.
    For most maps it does by itself. That is seen in the first iteration, in which the first result
    is copied; it is from then on if the map uses one buffer for all. A map that comes to do so
    later, as one that is compiled to CUDA graphs on its way, is an error.
    """

    def __init__(self, fn: RowFunction):
        if isinstance(fn, RowMatvec):
            self._fn, self._second_fn = fn.parts, fn.twin().parts
        else:
            self._fn = self._second_fn = lambda v: [fn(v)]
        self._copies = True
        self._result: list[Tensor] | None = None
        self._copy: list[Tensor] | None = None

    def first(self, v: Tensor) -> list[Tensor]:
        self._result = result = self._fn(v)
        if not self._copies:
            self._copy = None
            return result
        if self._copy is None:
            self._copy = [
                torch.empty_like(part, memory_format=torch.contiguous_format) for part in result
            ]
        return [copy.copy_(part) for copy, part in zip(self._copy, result, strict=True)]

    def second(self, v: Tensor) -> list[Tensor]:
        result = self._second_fn(v)
        if self._result is not None:
            shared = bool(_memory(self._result) & _memory(result))
            if shared and not self._copies:
                raise RuntimeError(
                    "the matvec, or M, returned new tensors at first and now writes over its last "
                    "result, which BiCGSTAB still needs: return result.clone(), or call a function "
                    "that is compiled to CUDA graphs a few times before the solve."
                )
            self._copies = shared
        self._result = None
        return result


def _memory(tensors: list[Tensor]) -> set[int]:
    """Where the pieces of memory begin that tensors lie in; what is empty lies in none."""
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def solve_bicgstab(
    *, matvec: Matvec | None = None, b: TensorTree | None = None, **fields: Any
) -> BiCGSTAB:
    """Return a BiCGSTAB solver, `(matvec, b) -> x`; `fields` are those of `BiCGSTAB`.

    `matvec` and `b` are accepted and not used, as by `solve_cg`.
    """
    return build(BiCGSTAB, fields)
