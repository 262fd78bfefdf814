"""A module whose `solve` makes its parameters differentiable functions of its meta-parameters."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tritonimplicit.diff.implicit.closures import Wording
from tritonimplicit.diff.implicit.decorator import check_solve, custom_root
from tritonimplicit.diff.implicit.gradients_aside import gradients_aside
from tritonimplicit.diff.implicit.nn.meta import MetaGradientModule
from tritonimplicit.diff.implicit.nn.replica import replicate
from tritonimplicit.diff.implicit.nn.solved import SolvedModule
from tritonimplicit.diff.implicit.pytrees import tree_leaves
from tritonimplicit.operators import Solve

Tensors: TypeAlias = "tuple[Tensor, ...]"
M = TypeVar("M", bound="ImplicitMetaGradientModule")


class ImplicitMetaGradientModule(SolvedModule, abc.ABC):
    """A module whose parameters solve an inner problem that its meta-parameters determine.

    A subclass has `solve`, which brings the parameters to the solution in whatever way, and either
    `objective`, which they then minimise, or `optimality`, which is then zero. After `solve` the
    parameters carry a graph to the meta-parameters, by the implicit function theorem:
    differentiating through them costs one linear solve and no memory of the way there.

        class Ridge(ImplicitMetaGradientModule, linear_solve=solve_cg()):
            def __init__(self, n, reg):          # reg requires grad: a meta-parameter
                super().__init__()
                self.reg = reg
                self.w = nn.Parameter(torch.zeros(n))
            def objective(self, x, y): ...
            def solve(self, x, y): ...

    `linear_solve` solves with the Jacobian of the optimality; a subclass without one has its
    parent's, and None is `custom_root`'s default. The unknowns are the parameters that require
    grad; frozen ones are constants. `solve` may be called again: it starts from the values reached
    and does not touch the graph of the solve before. Under `torch.no_grad()` it only solves.

    The optimality is evaluated on copies of the module as `solve` left it, with buffers of their
    own; attributes that it sets are not seen outside. It must reach parameters through `self`. A
    frozen parameter changed in place before the backward pass is autograd's version error; a tensor
    that is a mere attribute is shared too, and unchecked. No gradient flows into the arguments of
    `solve`. A copy of a solved module, by deepcopy or pickle, has the solution's values in leaves.

    Raises, when a subclass is made: TypeError for a subclass with neither `optimality` nor
    `objective`, or with one that is not a method, or a `linear_solve` that takes no (matvec, b).
    """

    linear_solve: ClassVar[Solve | None] = None

    def __init_subclass__(cls, linear_solve: Solve | None = None, **kwargs: Any) -> None:
        """Derive what is not given, and make `solve` differentiable."""
        super().__init_subclass__(**kwargs)
        if linear_solve is not None:
            check_solve("linear_solve", linear_solve)
            cls.linear_solve = linear_solve
        if not _is_derived(cls):
            _check_method(cls, "optimality")
        elif _is_base(cls, "objective"):
            raise TypeError(
                "ImplicitMetaGradientModule requires either an optimality() method "
                "or an objective() method"
            )
        else:
            _check_method(cls, "objective")
            make_optimality_from_objective(cls)
        if not (_is_enabled(cls.solve) or getattr(cls.solve, "__isabstractmethod__", False)):
            enable_implicit_gradients(cls)

    @abc.abstractmethod
    def solve(self, *args: Any, **kwargs: Any) -> Any:
        """Bring the parameters, in place, to the solution of the inner problem.

        It runs without gradients: turn them on for the steps that need them. Those that they leave
        in the `grad` of meta-parameters are dropped; a meta-parameter that is itself computed has
        a graph that `loss.backward(inputs=params)` keeps out of. What `solve` returns is passed
        through; often it is self.

        Raises:
            RuntimeError: the module has no parameters, or no meta-parameters.
        """
        raise NotImplementedError

    def optimality(self, *args: Any, **kwargs: Any) -> Tensors:
        """Return the residual that is zero at the solution, one tensor for each parameter.

        Shaped as the parameters that require grad, and in the order of `parameters()`; called with
        the arguments of `solve`. Without an own definition it is the gradient of `objective`.
        """
        raise NotImplementedError

    def objective(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the 0-dim tensor that the parameters minimise; called with `solve`'s arguments."""
        raise NotImplementedError


def make_optimality_from_objective(cls: type[M]) -> type[M]:
    """Give `cls` the gradient of its `objective` as `optimality`, and return it.

    Raises:
        TypeError: `cls` has no `objective`.
    """
    if _is_base(cls, "objective"):
        raise TypeError("The objective function is not defined.")

    def optimality(self: M, *args: Any, **kwargs: Any) -> Tensors:
        names, _ = _variables(self)
        params = _named(self, names)

        def objective(values: Tensors) -> Tensor:
            value: object = _with_tensors(self, params, values).objective(*args, **kwargs)
            if not isinstance(value, Tensor) or value.ndim:
                shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
                raise TypeError(
                    f"{type(self).__name__}.objective() must return a tensor without dimensions, "
                    f"not a {type(value).__name__}{shape}."
                )
            return value

        gradient: Tensors = torch.func.grad(objective)(params)
        return gradient

    optimality.from_objective = True  # type: ignore[attr-defined]
    cls.optimality = optimality  # type: ignore[assignment, method-assign]
    return cls


def enable_implicit_gradients(cls: type[M]) -> type[M]:
    """Wrap the `solve` of `cls` so that it leaves differentiable parameters, and return the class.

    Raises:
        TypeError: it is wrapped already.
    """
    run: Callable[..., Any] = cls.solve
    if _is_enabled(run):
        raise TypeError("Implicit gradients are already enabled for the `solve` method.")

    @functools.wraps(run)
    def solve(self: M, *args: Any, **kwargs: Any) -> Any:
        self._take_back()
        names, meta = _variables(self)
        if not torch.is_grad_enabled():
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            with gradients_aside((*meta, *given)):
                output = run(self, *args, **kwargs)
            self._take_back()
            return output
        # The graph keeps `solver` and must not keep this module (see _Snapshot): the module, and
        # what it returns, go by a list that is empty in the end.
        handover: list[Any] = [self]

        def solver(
            _: Tensors, __: Tensors, ___: Tensors, snapshot: _Snapshot, /, *args: Any, **kwargs: Any
        ) -> Any:
            module: M = handover.pop()
            with gradients_aside(_variables(module)[1]):
                handover.append(run(module, *args, **kwargs))
            module._take_back()  # run() may have called a parent's `solve` with grad
            snapshot.take(module, names)
            return tuple(p.detach().clone() for p in _named(module, names))

        residual = _gradient if _is_derived(type(self)) else _residual
        implicit = custom_root(residual, argnums=1, solve=type(self).linear_solve)(solver)
        frozen = tuple(p for name, p in self.named_parameters() if name not in names)
        solution = implicit((), meta, frozen, _Snapshot(), *args, **kwargs)
        self._issue(zip(solution, _named(self, names), strict=True))
        return handover.pop()

    solve.implicit_gradients_enabled = True  # type: ignore[attr-defined]
    cls.solve = solve  # type: ignore[assignment, method-assign]
    return cls


class _Snapshot:
    """A copy of the module as `solve` left it, without graphs, for the graph of its solution.

    That graph needs the module's code and state. Were it to hold the module itself, which holds the
    solution, there would be a cycle that Python's garbage collector cannot see.
    """

    module: ImplicitMetaGradientModule

    def take(self, module: ImplicitMetaGradientModule, names: tuple[str, ...]) -> None:
        # Buffers change from one solve to the next, and when the optimality is evaluated.
        tensors = {id(b): b.detach().clone() for b in _buffers(module)}

        def own(tensor: Tensor) -> Tensor:
            shared = tensor.detach() if tensor.grad_fn is not None else tensor
            return tensors.get(id(tensor), shared)

        self.module = replicate(module, own)
        vars(self.module)["_solved_for"] = names


def _residual(
    params: Tensors, meta: Tensors, _: Tensors, snapshot: _Snapshot, /, *args: Any, **kwargs: Any
) -> Tensors:
    """Return the optimality of the module with these parameters and meta-parameters.

    The frozen parameters are the module's own: they are given so that autograd checks for changes.
    """
    names, old_meta = _variables(snapshot.module)
    old = (*_named(snapshot.module, names), *old_meta)
    module = _with_tensors(snapshot.module, old, (*params, *meta))
    residual: object = module.optimality(*args, **kwargs)
    where = f"{type(module).__name__}.optimality()"
    if not isinstance(residual, (tuple, list)):
        raise TypeError(f"{where} must return a tuple of tensors, not a {type(residual).__name__}.")
    if len(residual) != len(params):
        raise ValueError(
            f"{where} must return a tensor for each parameter that requires grad, in the order of "
            f"parameters(): {len(params)} for {', '.join(names)}; it returned {len(residual)}."
        )
    for name, param, value in zip(names, params, residual, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{where} returned a {type(value).__name__} for parameter '{name}'.")
        if value.shape != param.shape:
            raise ValueError(
                f"{where} returned a tensor of shape {tuple(value.shape)} for parameter '{name}' "
                f"of shape {tuple(param.shape)}."
            )
    return tuple(residual)


def _gradient(*args: Any, **kwargs: Any) -> Tensors:
    """`_residual`, where the optimality is derived from an objective."""
    return _residual(*args, **kwargs)


_gradient.is_gradient = True  # type: ignore[attr-defined]
_gradient.wording = _residual.wording = Wording(  # type: ignore[attr-defined]
    "the module's optimality, or objective,",
    "no meta-parameters",
    "make them meta by register_meta_parameter or register_meta_module, or detach them",
)


def _with_tensors(module: M, old: Tensors, new: Tensors) -> M:
    """Return a copy of the module with the tensors `new` in the place of `old`."""
    tensors = dict(zip(map(id, old), new, strict=True))
    return replicate(module, lambda t: tensors.get(id(t), t))


def _variables(module: ImplicitMetaGradientModule) -> tuple[tuple[str, ...], Tensors]:
    """Return the names of the parameters to solve for, and the meta-parameters.

    In a snapshot and its copies the names are given: there, `requires_grad` no longer tells.
    """
    named = dict(module.named_parameters())
    names = vars(module).get("_solved_for", [n for n, p in named.items() if p.requires_grad])
    meta = tuple(module.meta_parameters())
    if not named:
        raise RuntimeError("The module has no parameters.")
    if not names:
        raise RuntimeError("The module has no parameters that require grad.")
    if not meta:
        raise RuntimeError("The module has no meta-parameters.")
    meta_ids = set(map(id, meta))
    if shared := [name for name in names if id(named[name]) in meta_ids]:
        raise RuntimeError(
            f"Parameters of the module are meta-parameters as well: {', '.join(shared)}. "
            'Make them copies, for example by module_clone(meta_module, by="deepcopy").'
        )
    return tuple(names), meta


def _buffers(module: nn.Module) -> Iterator[Tensor]:
    """Iterate over the buffers of a module and of what is meta to it."""
    yield from module.buffers()
    for owner in module.modules():
        if isinstance(owner, MetaGradientModule):
            yield from _buffers(owner._meta)


def _named(module: nn.Module, names: tuple[str, ...]) -> Tensors:
    named = dict(module.named_parameters())
    if missing := [name for name in names if name not in named]:
        raise RuntimeError(f"solve() removed parameters of the module: {', '.join(missing)}.")
    return tuple(named[name] for name in names)


def _is_base(cls: type, name: str) -> bool:
    """Whether a class inherits this method from `ImplicitMetaGradientModule` itself."""
    base = inspect.getattr_static(ImplicitMetaGradientModule, name)
    return inspect.getattr_static(cls, name) is base


def _is_derived(cls: type) -> bool:
    """Whether the optimality of a class is to be, or was, derived from its objective."""
    own = inspect.getattr_static(cls, "optimality")
    return _is_base(cls, "optimality") or getattr(own, "from_objective", False)


def _is_enabled(solve: Callable[..., Any]) -> bool:
    return getattr(solve, "implicit_gradients_enabled", False)


def _check_method(cls: type, name: str) -> None:
    method = inspect.getattr_static(cls, name)
    if isinstance(method, (staticmethod, classmethod)):
        raise TypeError(f"method {name}() must not be a {type(method).__name__}.")
    if not callable(method):
        raise TypeError(f"method {name}() must be callable.")
