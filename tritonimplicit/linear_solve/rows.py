"""A system as the kernels see it: (B, ld) rows, and a matvec from rows to rows."""

from __future__ import annotations

from dataclasses import dataclass

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.operators import Matvec
from tritonimplicit.vectors import Layout


@dataclass(frozen=True)
class RowSolution:
    """`Solution`, on rows: x is (B, ld), the others are (B,)."""

    x: Tensor
    status: Tensor
    iterations: Tensor
    residual_norm: Tensor


class RowMatvec:
    """(B, ld) -> (B, ld): v -> A v + ridge v, by a matvec on pytrees, which errors call `name`.

    What it returns is to be read only, and valid until the next call.
    """

    def __init__(
        self,
        matvec: Matvec,
        layout: Layout,
        ridge: float | Tensor | None = None,
        name: str = "the matvec",
    ):
        self.layout = layout
        self.matvec = matvec
        self.ridge = ridge
        self._name = name
        self._out: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """A v + ridge v."""
        version = None if v.is_inference() else v._version
        result = refuse_gradient(self.matvec(self.layout.unflatten(v)), self._name)
        if version is not None and v._version != version:
            raise RuntimeError(
                f"{self._name} changed its argument in place, which is the solver's own vector: "
                "return a new tensor."
            )
        rows = self.layout.gather(result, self._buffer, f"the result of {self._name}")
        if isinstance(self.ridge, Tensor):
            return torch.addcmul(rows, v, self.ridge, out=self._buffer())
        if self.ridge is not None:
            return torch.add(rows, v, alpha=self.ridge, out=self._buffer())
        if _share_memory(
            rows, v
        ):  # an identity hands v back, and v changes while the result is read
            return self._buffer().copy_(rows)
        return rows

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        """b - (A x + ridge x)."""
        return torch.sub(b, self(x), out=self._buffer())

    def _buffer(self) -> Tensor:
        if self._out is None:
            self._out = self.layout.zeros()
        return self._out


def refuse_gradient(result: TensorTree, name: str = "the matvec") -> TensorTree:
    """Return the result of `name`, or raise RuntimeError if that loses a gradient."""
    if any(isinstance(t, Tensor) and t.requires_grad for t in optree.tree_leaves(result)):
        raise RuntimeError(
            f"the result of {name} requires grad, but a solver called directly is not "
            "differentiated: call it under torch.no_grad(), or detach what that function closes "
            "over; custom_root gives gradients through a solution."
        )
    return result


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
