"""The layout of a batched solve: what the ops take, checked before anything is written.

B systems, rows of ld elements (ld a multiple of 16, the padding zero), P partial sums a row; or,
where there is a matrix `a`, dense systems of n unknowns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

MAX_P: Final = 256
MAX_DENSE: Final = 128
"""The most unknowns of a dense system."""

_VECTOR_DTYPES = (torch.float32, torch.float64)
_VECTORS = (
    *("x", "r", "p", "ap", "d", "b", "ax"),
    *("shadow", "y", "z", "v", "s", "t"),  # BiCGSTAB's
)
_DENSE = ("a", "rhs", "solution")
SHAPES: Final = {
    **dict.fromkeys(_VECTORS, "B, ld"),
    "dots": "2, B, P",
    "shadow_dots": "3, B, P",
    "half_dots": "4, B, P",
    **dict.fromkeys(("rr", "rr_out", "rz", "rz_out", "ss"), "B, P"),
    **dict.fromkeys(("threshold", "limit", "alpha", "rho", "unit", "residual_sq"), "B"),
    **dict.fromkeys(("state", "state_out"), "2, B"),
    "a": "B, n, n",
    **dict.fromkeys(("rhs", "solution"), "B, n"),
}


def dtype_of(name: str, vector_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the tensor known by `name` beside vectors of `vector_dtype`."""
    if name in ("state", "state_out"):
        return torch.int32
    return vector_dtype if name in (*_VECTORS, *_DENSE) else torch.float64


def shape_of(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of the tensor known by `name`, for these sizes of B, ld, P and n."""
    return tuple(int(d) if d.isdigit() else sizes[d] for d in SHAPES[name].split(", "))


def check_layout(**tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless the tensors, known by name, fit together.

    The first must be a vector, or the matrix `a`: it says what B, ld or n, dtype and device are.
    """
    name, first = next(iter(tensors.items()))
    if first.dtype not in _VECTOR_DTYPES:
        raise TypeError(f"{name} must be float32 or float64, not {first.dtype}")
    sizes = _dense_sizes(first) if name == "a" else _row_sizes(name, first, **tensors)
    for name, tensor in tensors.items():
        dtype = dtype_of(name, first.dtype)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
        shape = shape_of(name, sizes)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be ({SHAPES[name]}), here {shape}, not {tuple(tensor.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device}, not on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, but its strides are {tensor.stride()}")


def check_memory(**tensors: Tensor) -> None:
    """Raise ValueError for a vector that is not aligned, or an output that is also an input."""
    for name, tensor in tensors.items():
        if name in _VECTORS and tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes in memory: clone it")
        source = tensors.get(name.removesuffix("_out"))
        if name.endswith("_out") and source is not None and source.data_ptr() == tensor.data_ptr():
            raise ValueError(f"{name} must have memory of its own, apart from its input's")


def _dense_sizes(a: Tensor) -> dict[str, int]:
    if a.ndim != 3 or not 1 <= a.shape[1] <= MAX_DENSE:
        raise ValueError(f"a must be (B, n, n) with n from 1 to {MAX_DENSE}, not {tuple(a.shape)}")
    return {"B": a.shape[0], "n": a.shape[1]}


def _row_sizes(name: str, first: Tensor, **tensors: Tensor) -> dict[str, int]:
    if first.ndim != 2 or first.shape[1] == 0 or first.shape[1] % 16:
        raise ValueError(
            f"{name} must be (B, ld) with ld a positive multiple of 16, not "
            f"{tuple(first.shape)}: pad the rows with zeros"
        )
    return {"B": first.shape[0], "ld": first.shape[1], "P": _partial_count(**tensors)}


def _partial_count(**tensors: Tensor) -> int:
    name, partials = next((n, t) for n, t in tensors.items() if "P" in SHAPES[n])
    count = partials.shape[-1] if partials.ndim else 0
    if not 1 <= count <= MAX_P:
        raise ValueError(
            f"{name} must be ({SHAPES[name]}) with P from 1 to {MAX_P}, not {tuple(partials.shape)}"
        )
    return count
