"""A user's solver may call `backward()`, which adds to the gradients of all leaves it reaches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor


@contextlib.contextmanager
def gradients_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Leave the `.grad` of the leaves among `tensors` as they are, whatever is done inside."""
    leaves = [t for t in tensors if t.is_leaf]
    kept = [t.grad for t in leaves]
    for leaf in leaves:
        leaf.grad = None  # autograd may add in place
    try:
        yield
    finally:
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient
