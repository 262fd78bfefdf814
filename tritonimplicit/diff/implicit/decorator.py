"""`custom_root`: gives a solver the gradient of the root that it finds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from tritonimplicit.diff.implicit.arguments import PREFIX, Arguments, Key
from tritonimplicit.diff.implicit.autocast import AutocastState
from tritonimplicit.diff.implicit.call import RootCall, RootProblem
from tritonimplicit.diff.implicit.closures import refuse_transformed_closure, warn_of_closure
from tritonimplicit.diff.implicit.root import Root
from tritonimplicit.linear_solve.normal_cg import NormalCG
from tritonimplicit.operators import Solve
from tritonimplicit.torch_internals import (
    forward_ad_active,
    is_gradient,
    transforms_active,
    untraced,
)

SolverFn = TypeVar("SolverFn", bound=Callable[..., Any])


def custom_root(
    optimality_fn: Callable[..., Any],
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    solve: Solve | None = None,
    *,
    argnames: str | Sequence[str] | None = None,
) -> Callable[[SolverFn], SolverFn]:
    """Decorate `solver_fn(init, *args) -> x`, which finds x with optimality_fn(x, *args) = 0.

    The solver runs without grad, on arguments without a graph: what it differentiates itself, under
    torch.enable_grad(), adds to no gradient outside (but of a leaf that is `init` alone). Its
    result carries the gradient of the root, by the implicit function theorem, into the arguments
    named by `argnums` and `argnames`; `init` and the other arguments get none. x and those
    arguments are tensors or pytrees of tensors: tuples, dicts, namedtuples, and classes registered
    with optree, globally or in the namespace "tritonimplicit". `optimality_fn` takes the solver's
    arguments with x in the place of `init` and returns a residual of x's structure and shapes. In
    the backward pass it runs under the autocast of the forward pass.

    Args:
        optimality_fn: the optimality condition, a differentiable function; a fixed point z = f(z)
            is the root of z - f(z). What it closes over gets no gradient (a warning says so), and
            random numbers that it draws, a dropout's mask, must be an argument (another warning):
            those of the backward pass are not those that the solver has seen.
        argnums: which arguments of the solver to differentiate in, counting `init` as 0; not 0.
        has_aux: the solver returns (x, aux); aux is handed through untouched.
        solve: `(matvec, b) -> u`, called in the backward pass with A^T, A = d optimality / d x, and
            a tuple of tensors b; None is `linear_solve.solve_normal_cg()`.
        argnames: the same by name, keyword-only arguments too; beside `argnums` or in its place.

    Raises:
        TypeError, ValueError: for `argnums` or `argnames` that name no argument to differentiate
            in, or a `solve` that does not take (matvec, b), here.
        RuntimeError: "custom_root(optimality_fn)(solver_fn)(*args): ..." at a call whose arguments
            or result do not fit.
        TypeError: at a call whose keyword arguments `optimality_fn` cannot take, or in the backward
            pass for an optimality of another structure than x.
    """
    positions, names = _positions(argnums), _names(argnames)
    if not (positions or names):
        raise ValueError("argnums and argnames are empty: name an argument to differentiate in.")
    solver = NormalCG() if solve is None else solve
    check_solve("solve", solver)

    def decorate(solver_fn: SolverFn) -> SolverFn:
        solver_signature = inspect.signature(solver_fn)
        optimality_signature = inspect.signature(optimality_fn)
        named = (*positions, *_keys(solver_signature, names))
        symmetric = is_gradient(optimality_fn) or getattr(optimality_fn, "is_gradient", False)

        @functools.wraps(solver_fn)
        @untraced
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            bound = solver_signature.bind(*args, **kwargs)
            bound.apply_defaults()
            _check_optimality_takes(optimality_signature, bound)
            arguments, tensors = Arguments.flatten(bound, named)
            if transforms_active() or forward_ad_active():
                refuse_transformed_closure(optimality_fn)
            elif torch.is_grad_enabled() and not arguments.require_grad(tensors):
                warn_of_closure(optimality_fn)
            call = RootCall(solver_fn, optimality_fn, arguments, AutocastState(tensors), has_aux)
            return call.result(Root.apply(RootProblem.of(call, solver, symmetric), *tensors))  # type: ignore[no-untyped-call]

        return wrapped  # type: ignore[return-value]

    return decorate


def check_solve(name: str, solve: object) -> None:
    """Raise TypeError for what cannot be called as solve(matvec, b)."""
    if not callable(solve):
        raise TypeError(
            f"{name} must be a function of (matvec, b), such as solve_cg(), "
            f"not a {type(solve).__name__}."
        )
    try:
        signature = inspect.signature(solve)
    except ValueError:  # as many functions written in C have none
        return
    try:
        signature.bind(None, None)
    except TypeError:
        own = getattr(solve, "__name__", type(solve).__name__)
        raise TypeError(
            f"{name} must be a function of (matvec, b); {own} takes other arguments. If it makes "
            f"such a function, call it: {name}=solve_cg(), not {name}=solve_cg."
        ) from None


def _positions(argnums: int | Sequence[int] | None) -> tuple[int, ...]:
    if argnums is None:
        return ()
    positions = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    for position in positions:
        if isinstance(position, bool) or not isinstance(position, int):
            raise TypeError(f"argnums must be an int or a tuple of ints, not {argnums!r}.")
        if position < 1:
            raise ValueError(
                f"argnums counts the solver's first argument, the initial guess, as 0, which has "
                f"no gradient; positions must be 1 or more, not {argnums!r}."
            )
    return positions


def _names(argnames: str | Sequence[str] | None) -> tuple[str, ...]:
    if argnames is None:
        return ()
    names = (argnames,) if isinstance(argnames, str) else argnames
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"argnames must be a str or a tuple of str, not {argnames!r}.")
    return tuple(names)


def _keys(signature: inspect.Signature, names: tuple[str, ...]) -> tuple[Key, ...]:
    """The names' positions, where they have one."""
    keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    positional = [p.name for p in signature.parameters.values() if p.kind not in keyword]
    if positional and positional[0] in names:
        raise ValueError(
            f"argnames names the solver's first argument, the initial guess {positional[0]!r}, "
            "which has no gradient."
        )
    return tuple(positional.index(name) if name in positional else name for name in names)


def _check_optimality_takes(signature: inspect.Signature, bound: inspect.BoundArguments) -> None:
    try:
        signature.bind(*bound.args, **bound.kwargs)
    except TypeError as error:
        raise TypeError(
            f"{PREFIX} the arguments of solver_fn ({len(bound.args)} positional, keywords "
            f"{sorted(bound.kwargs)}) could not be resolved to those of optimality_fn{signature}: "
            f"{error}."
        ) from None
