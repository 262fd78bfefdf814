"""Finds the tensors that a function uses without being given them: they get no gradient."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optree
from torch import Tensor

from tritonimplicit.torch_internals import is_transformed


def hidden_leaves(outputs: Iterable[Tensor], given: Iterable[Tensor]) -> list[Tensor]:
    """Leaf tensors that require grad in the graph of `outputs`, and are not among `given`."""
    known = {id(t) for t in given}
    pending = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen, hidden = set(pending), []
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)  # only the graph's accumulation nodes have one
        if leaf is not None and id(leaf) not in known:
            hidden.append(leaf)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return hidden


def warn_of_hidden_leaves(outputs: Iterable[Tensor], given: Iterable[Tensor]) -> None:
    """Warn if the optimality reaches parameters through a closure: they get no gradient."""
    hidden = hidden_leaves(outputs, given)
    if hidden:
        shapes = ", ".join(str(tuple(t.shape)) for t in hidden[:5])
        warnings.warn(
            f"optimality_fn uses {len(hidden)} tensors that require grad and are in no argument "
            f"named by argnums (shapes {shapes}{', ...' if len(hidden) > 5 else ''}): they get no "
            "gradient. Pass them as an argument and name it in argnums (a module's parameters "
            "through torch.func.functional_call), or detach them.",
            UserWarning,
            stacklevel=2,
        )


def closed_over(fn: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Tensors in the closure of a function, and in those of the functions that it closes over."""
    seen = set() if seen is None else seen
    if id(fn) in seen:
        return
    seen.add(id(fn))
    if isinstance(fn, functools.partial):
        contents: Any = [fn.func, *fn.args, *fn.keywords.values()]
    else:
        contents = [cell.cell_contents for cell in getattr(fn, "__closure__", None) or ()]
    leaves: list[Any] = optree.tree_leaves(contents)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            yield leaf
        elif callable(leaf):
            yield from closed_over(leaf, seen)


def refuse_transformed_closure(fn: Callable[..., Any]) -> None:
    """Raise RuntimeError if a torch.func transform would lose a gradient through fn's closure."""
    if any(is_transformed(tensor) for tensor in closed_over(fn)):
        raise RuntimeError(
            "optimality_fn closes over a tensor that a torch.func transform (grad, jvp, vmap, ...) "
            "is working on, which would silently get no gradient: pass it as an argument and name "
            "it in argnums."
        )
