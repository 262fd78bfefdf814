"""`custom_root`: gives a solver the gradient of the root that it finds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tritonimplicit.diff.implicit.call import PREFIX, RootCall
from tritonimplicit.diff.implicit.closures import refuse_transformed_closure
from tritonimplicit.diff.implicit.root import Root
from tritonimplicit.linear_solve.base import Solve
from tritonimplicit.linear_solve.normal_cg import NormalCG
from tritonimplicit.torch_internals import transforms_active, untraced

SolverFn = TypeVar("SolverFn", bound=Callable[..., Any])


def custom_root(
    optimality_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool = False,
    solve: Solve | None = None,
) -> Callable[[SolverFn], SolverFn]:
    """Decorate `solver_fn(init, *args) -> x`, which finds x with optimality_fn(x, *args) = 0.

    The solver runs without grad. Its result carries the gradient of the root, by the implicit
    function theorem, into the arguments numbered by `argnums`; `init` and the other arguments get
    none. x and those arguments are tensors or optree pytrees of tensors; `optimality_fn` takes the
    solver's arguments with x in the place of `init` and returns a residual of x's structure and
    shapes.

    Args:
        optimality_fn: the optimality condition, a differentiable function; a fixed point z = f(z)
            is the root of z - f(z). What it closes over gets no gradient (a warning says so).
        argnums: which arguments of the solver to differentiate in, counting `init` as 0; not 0.
        has_aux: the solver returns (x, aux); aux is handed through untouched.
        solve: `(matvec, b) -> u`, called in the backward pass with A^T, A = d optimality / d x, and
            a tuple of tensors b; None is `linear_solve.solve_normal_cg()`.

    Raises:
        TypeError, ValueError: for an `argnums` that is no position, here.
        RuntimeError: "custom_root(optimality_fn)(solver_fn)(*args): ..." at a call whose arguments
            or result do not fit.
        TypeError: at a call whose keyword arguments `optimality_fn` cannot take, or in the backward
            pass for an optimality of another structure than x.
    """
    positions = _positions(argnums)
    solver = NormalCG() if solve is None else solve

    def decorate(solver_fn: SolverFn) -> SolverFn:
        solver_signature = inspect.signature(solver_fn)
        optimality_signature = inspect.signature(optimality_fn)

        @functools.wraps(solver_fn)
        @untraced
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if transforms_active():
                refuse_transformed_closure(optimality_fn)
            bound = solver_signature.bind(*args, **kwargs)
            bound.apply_defaults()
            _check_optimality_takes(optimality_signature, bound)
            call = RootCall(solver_fn, optimality_fn, solver, positions, has_aux, bound)
            return call.result(Root.apply(call.problem, *call.tensors))  # type: ignore[no-untyped-call]

        return wrapped  # type: ignore[return-value]

    return decorate


def _positions(argnums: int | Sequence[int]) -> tuple[int, ...]:
    positions = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    for position in positions:
        if isinstance(position, bool) or not isinstance(position, int):
            raise TypeError(f"argnums must be an int or a tuple of ints, not {argnums!r}.")
        if position < 1:
            raise ValueError(
                f"argnums counts the solver's first argument, the initial guess, as 0, which has "
                f"no gradient; positions must be 1 or more, not {argnums!r}."
            )
    if not positions:
        raise ValueError("argnums is empty: name at least one argument to differentiate in.")
    return positions


def _check_optimality_takes(signature: inspect.Signature, bound: inspect.BoundArguments) -> None:
    try:
        signature.bind(*bound.args, **bound.kwargs)
    except TypeError as error:
        raise TypeError(
            f"{PREFIX} the arguments of solver_fn ({len(bound.args)} positional, keywords "
            f"{sorted(bound.kwargs)}) could not be resolved to those of optimality_fn{signature}: "
            f"{error}."
        ) from None
