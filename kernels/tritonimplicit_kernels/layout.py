"""The layout of a batched solve: what the ops take, checked before anything is written.

B systems, rows of ld elements (ld a multiple of 16, the padding zero), P partial sums a row. What a
matvec has returned, `ap` or `ax`, may be float16 or bfloat16: it is widened as it is read.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MAX_P: Final = 256

_VECTOR_DTYPES = (torch.float32, torch.float64)
_HALF_DTYPES = (torch.float16, torch.bfloat16)
PRODUCT: Final = frozenset({"ap", "ax"})
"""What a matvec has returned: read only, so that it may have half the vectors' precision."""
_VECTORS = ("x", "r", "p", "ap", "d", "b", "ax")
SHAPES: Final = {
    **dict.fromkeys(_VECTORS, "B, ld"),
    "dots": "2, B, P",
    **dict.fromkeys(("rr", "rr_out", "rz", "rz_out"), "B, P"),
    **dict.fromkeys(("threshold", "limit", "alpha", "residual_sq"), "B"),
    **dict.fromkeys(("state", "state_out"), "2, B"),
}


def dtype_of(name: str, vector_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the tensor known by `name` beside vectors of `vector_dtype`."""
    if name in ("state", "state_out"):
        return torch.int32
    return vector_dtype if name in _VECTORS else torch.float64


def check_layout(**tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless the tensors, known by name, fit together.

    The first must be a vector: it says what B, ld, the vectors' dtype and the device are.
    """
    name, first = next(iter(tensors.items()))
    if first.dtype not in _VECTOR_DTYPES:
        raise TypeError(f"{name} must be float32 or float64, not {first.dtype}")
    if first.ndim != 2 or first.shape[1] == 0 or first.shape[1] % 16:
        raise ValueError(
            f"{name} must be (B, ld) with ld a positive multiple of 16, not "
            f"{tuple(first.shape)}: pad the rows with zeros"
        )
    sizes = {"2": 2, "B": first.shape[0], "ld": first.shape[1], "P": _partial_count(**tensors)}
    for name, tensor in tensors.items():
        dtype = dtype_of(name, first.dtype)
        if tensor.dtype != dtype and not (name in PRODUCT and tensor.dtype in _HALF_DTYPES):
            or_half = " or half precision" if name in PRODUCT else ""
            raise TypeError(f"{name} must be {dtype}{or_half}, not {tensor.dtype}")
        shape = tuple(sizes[size] for size in SHAPES[name].split(", "))
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


def _partial_count(**tensors: Tensor) -> int:
    name, partials = next((n, t) for n, t in tensors.items() if "P" in SHAPES[n])
    count = partials.shape[-1] if partials.ndim else 0
    if not 1 <= count <= MAX_P:
        raise ValueError(
            f"{name} must be ({SHAPES[name]}) with P from 1 to {MAX_P}, not {tuple(partials.shape)}"
        )
    return count
