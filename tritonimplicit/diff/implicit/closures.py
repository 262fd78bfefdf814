"""Finds the tensors that a function uses without being given them: they get no gradient."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tritonimplicit.diagnostics import callers_level
from tritonimplicit.diff.implicit.pytrees import tree_leaves
from tritonimplicit.operators import graph_leaves
from tritonimplicit.torch_internals import has_tangent, is_transformed, transforms_active

_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinMethodType, functools.partial)
_INERT = (bool, int, float, str, type, types.ModuleType)


@dataclass(frozen=True)
class Wording:
    """What messages call an optimality, and how what it uses becomes an argument of it."""

    subject: str = "optimality_fn"
    named: str = "in no argument named by argnums"
    remedy: str = (
        "pass them as an argument and name it in argnums (a module's parameters through "
        "torch.func.functional_call), or detach them"
    )


def wording_of(fn: Callable[..., Any], default: Wording = Wording()) -> Wording:
    """What messages call `fn`: its attribute `wording`, if it is one of ours."""
    wording = getattr(fn, "wording", None)
    return wording if isinstance(wording, Wording) else default


def hidden_leaves(outputs: Iterable[Tensor], given: Iterable[Tensor]) -> list[Tensor]:
    """Leaf tensors that require grad in the graph of `outputs`, and are not among `given`."""
    known = {id(t) for t in given}
    return [leaf for leaf in graph_leaves(list(outputs)) if id(leaf) not in known]


def warn_of_hidden_leaves(
    outputs: Iterable[Tensor], given: Iterable[Tensor], wording: Wording
) -> None:
    """Warn if the optimality reaches parameters through a closure: they get no gradient."""
    _warn_of(hidden_leaves(outputs, given), wording)


def warn_of_closure(fn: Callable[..., Any]) -> None:
    """The same where no named argument requires grad, so that no backward pass would tell."""
    _warn_of([tensor for tensor in held_by(fn) if tensor.requires_grad], wording_of(fn))


def _warn_of(hidden: list[Tensor], wording: Wording) -> None:
    if hidden:
        shapes = ", ".join(str(tuple(t.shape)) for t in hidden[:5])
        warnings.warn(
            f"{wording.subject} uses {len(hidden)} tensors that require grad and are "
            f"{wording.named} (shapes {shapes}{', ...' if len(hidden) > 5 else ''}). They get no "
            f"gradient: {wording.remedy}.",
            UserWarning,
            stacklevel=callers_level(),
        )


def closed_over(fn: Any) -> Iterator[Tensor]:
    """Tensors that a function holds without being given them, those of modules left out.

    It holds its closure, its defaults and the object that it is a method of, or that is called as
    it is; and what these hold. A module's parameters are not among them: functional_call may give
    it others.
    """
    return _walk(fn, set(), into_modules=False)


def held_by(thing: Any) -> Iterator[Tensor]:
    """The same for an object of any kind that is no pytree, the parameters of modules included."""
    return _walk(thing, set(), into_modules=True)


def _walk(
    things: Any, seen: set[int], *, into_modules: bool, into_all: bool = True
) -> Iterator[Tensor]:
    for leaf in tree_leaves(things):
        follow = into_all or callable(leaf) or isinstance(leaf, Tensor) or is_dataclass(leaf)
        if not follow or id(leaf) in seen or isinstance(leaf, _INERT):
            continue
        seen.add(id(leaf))
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, nn.Module):
            if into_modules:
                yield from leaf.parameters()
        else:
            # Functions name what they hold; the attributes of other objects may lead anywhere.
            named = isinstance(leaf, _FUNCTIONS)
            yield from _walk(_contents(leaf), seen, into_modules=into_modules, into_all=named)


def _contents(thing: Any) -> list[Any]:
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, (types.MethodType, types.BuiltinMethodType)):
        return [getattr(thing, "__func__", None), thing.__self__]
    if isinstance(thing, types.FunctionType):
        contents: list[Any] = [thing.__defaults__, thing.__kwdefaults__]
        for cell in thing.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is still empty
                contents.append(cell.cell_contents)
        return contents
    members = {name: m for cls in reversed(type(thing).__mro__) for name, m in vars(cls).items()}
    slots = [name for name, member in members.items() if inspect.ismemberdescriptor(member)]
    attributes = [
        *getattr(thing, "__dict__", {}).values(),
        *(getattr(thing, s, None) for s in slots),
    ]
    return [*attributes, members.get("__call__")]


class HiddenTransforms(TorchFunctionMode):
    """Raises RuntimeError for an operation on a tensor that a torch.func transform works on.

    A solver runs below all transforms, on the plain values of its arguments; what it reaches in
    another way, such as the parameters of a module inside functional_call, gets no gradient.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In a transform of the solver's own nothing tells its tensors from those outside.
        if not transforms_active():
            leaves = tree_leaves((args, kwargs))
            if any(isinstance(leaf, Tensor) and is_transformed(leaf) for leaf in leaves):
                raise RuntimeError(
                    "solver_fn uses a tensor that is none of its arguments and that a torch.func "
                    "transform (grad, jvp, vmap, ...) is working on: it would silently get no "
                    "gradient. Pass it as an argument; name it in argnums if it is to get one (a "
                    "module's parameters as a dict, for torch.func.functional_call)."
                )
        return func(*args, **(kwargs or {}))


def refuse_transformed_closure(fn: Callable[..., Any]) -> None:
    """Raise RuntimeError if a transform or forward AD would lose the gradient of a closure."""
    if any(is_transformed(tensor) or has_tangent(tensor) for tensor in closed_over(fn)):
        wording = wording_of(fn)
        raise RuntimeError(
            f"{wording.subject} closes over tensors, or over objects with some among their "
            "attributes, that forward-mode AD or a torch.func transform (grad, jvp, vmap, ...) is "
            f"working on, which would silently get no gradient: {wording.remedy}."
        )
