"""Preconditioners on rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tritonimplicit.linear_solve.rows import RowMatvec


def row_preconditioner(M: Any, apply: RowMatvec) -> Callable[[Tensor], Tensor] | None:
    """Return r -> M r on (B, ld) rows, M approximating the inverse of A; None where `M` is None."""
    if M is None:
        return None
    layout = apply.layout

    def precondition(r: Tensor) -> Tensor:
        return layout.gather(M(layout.unflatten(r)), layout.zeros, "the result of M")

    return precondition
