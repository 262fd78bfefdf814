"""Finds the tensors that a recorded function uses without having been given them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor


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
