"""The layout of a batched solve: what the ops take, checked before anything is written.

B systems, rows of ld elements (ld a multiple of 16, the padding zero), P partial sums a row; a
basis or a history has room for K vectors of each system. Or, where there is a matrix `a`, dense
systems of n unknowns. What a matvec has returned, `ap`, `ax`, `v` or `t`, may be float16 or
bfloat16: it is widened as it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

MAX_P: Final = 256
MAX_DENSE: Final = 128
"""The most unknowns of a dense system."""

MOST_ITERATIONS: Final = 2**31 - 1
"""What a system's iterations, in int32, can be compared with."""

_VECTOR_DTYPES = (torch.float32, torch.float64)
_HALF_DTYPES = (torch.float16, torch.bfloat16)
PRODUCT: Final = frozenset({"ap", "ax", "v", "t"})
"""What a matvec has returned: read only, so that it may have half the vectors' precision."""
_HISTORIES = ("basis", "residuals", "moves")
_ROWS = (
    *("x", "r", "p", "ap", "d", "b", "ax"),
    *("shadow", "y", "z", "v", "s", "t"),  # BiCGSTAB's
    *("w", "w_out", "image", "z_before", "z_out", "residual"),  # of those with a history
)
_VECTORS = (*_ROWS, *_HISTORIES)
_DENSE = ("a", "rhs", "solution")
SHAPES: Final = {
    **dict.fromkeys(_ROWS, "B, ld"),
    **dict.fromkeys(_HISTORIES, "K, B, ld"),
    "dots": "2, B, P",
    "shadow_dots": "3, B, P",
    "half_dots": "4, B, P",
    **dict.fromkeys(("products", "first", "second", "row"), "K, B, P"),
    "squares": "2, B, P",
    **dict.fromkeys(("rr", "rr_out", "rz", "rz_out", "ss", "ww"), "B, P"),
    **dict.fromkeys(("left", "column"), "B, K + 1"),
    "coefficients": "B, K",
    **dict.fromkeys(("threshold", "limit", "alpha", "rho", "unit", "residual_sq", "norm"), "B"),
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
    """Return the shape of the tensor known by `name`, for these sizes of B, ld and so on."""
    return tuple(int(d) if d.isdigit() else sizes[d] for d in SHAPES[name].split(", "))


def check_layout(**tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless the tensors, known by name, fit together.

    The first must be a vector, or the matrix `a`: it says what B, ld or n, dtype and device are.
    """
    name, first = next(iter(tensors.items()))
    if first.dtype not in _VECTOR_DTYPES:
        raise TypeError(f"{name} must be float32 or float64, not {first.dtype}")
    sizes = _dense_sizes(first) if name == "a" else _row_sizes(name, first, tensors)
    for name, tensor in tensors.items():
        dtype = dtype_of(name, first.dtype)
        if tensor.dtype != dtype and not (name in PRODUCT and tensor.dtype in _HALF_DTYPES):
            or_half = " or half precision" if name in PRODUCT else ""
            raise TypeError(f"{name} must be {dtype}{or_half}, not {tensor.dtype}")
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
        if not name.endswith("_out") or tensor.numel() == 0:  # what is empty has no memory
            continue
        source = tensors.get(name.removesuffix("_out"))
        if source is not None and source.data_ptr() == tensor.data_ptr():
            raise ValueError(f"{name} must have memory of its own, apart from its input's")


def check_counts(counts: dict[str, int], **tensors: Tensor) -> None:
    """Raise ValueError unless `count` vectors of a history, and the one in `slot`, are there.

    And unless the int32 counters of the systems can reach `maxiter`.
    """
    limits = {
        "count": (1, _capacity(**tensors)),
        "slot": (0, counts.get("count", 0) - 1),
        "maxiter": (0, MOST_ITERATIONS),
    }
    for name in limits.keys() & counts.keys():
        low, high = limits[name]
        if not low <= counts[name] <= high:
            raise ValueError(f"{name} must be from {low} to {high}, not {counts[name]}")


def _capacity(**tensors: Tensor) -> int:
    """K, the vectors of a system that a history has room for, or 0 where there is none."""
    name, history = next(((n, t) for n, t in tensors.items() if n in _HISTORIES), ("", None))
    if history is None:
        return 0
    if history.ndim != 3 or history.shape[0] == 0:
        raise ValueError(f"{name} must be (K, B, ld) with K positive, not {tuple(history.shape)}")
    return history.shape[0]


def _dense_sizes(a: Tensor) -> dict[str, int]:
    if a.ndim != 3 or not 1 <= a.shape[1] <= MAX_DENSE:
        raise ValueError(f"a must be (B, n, n) with n from 1 to {MAX_DENSE}, not {tuple(a.shape)}")
    return {"B": a.shape[0], "n": a.shape[1]}


def _row_sizes(name: str, first: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    if first.ndim != 2 or first.shape[1] == 0 or first.shape[1] % 16:
        raise ValueError(
            f"{name} must be (B, ld) with ld a positive multiple of 16, not "
            f"{tuple(first.shape)}: pad the rows with zeros"
        )
    capacity = _capacity(**tensors)
    sizes = {"B": first.shape[0], "ld": first.shape[1], "P": _partial_count(**tensors)}
    return sizes | {"K": capacity, "K + 1": capacity + 1}


def _partial_count(**tensors: Tensor) -> int:
    name, partials = next(((n, t) for n, t in tensors.items() if "P" in SHAPES[n]), ("", None))
    if partials is None:
        return 0
    count = partials.shape[-1] if partials.ndim else 0
    if not 1 <= count <= MAX_P:
        raise ValueError(
            f"{name} must be ({SHAPES[name]}) with P from 1 to {MAX_P}, not {tuple(partials.shape)}"
        )
    return count
