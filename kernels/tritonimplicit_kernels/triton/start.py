"""Starting a kernel at little cost to the host.

At each launch Triton looks over every argument to find out which of a kernel's compiled forms is
meant. Here the first launch of a kind goes that way, and the form that it used starts the others.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

# On ROCm a form also depends on the sizes of the tensors' memory: all launches go Triton's way.
_KEEPS: Final = torch.version.hip is None
_ALIGNMENT: Final = 16
"""In bytes: what Triton compiles for, and what each tensor of a kept form's launches has."""

_forms: Final[dict[tuple[object, ...], Any]] = {}


def start(
    kernel: Any,
    device: int,
    programs: int,
    args: tuple[Tensor | int | float, ...],
    constexprs: tuple[int, ...],
    num_warps: int,
    fp_fusion: bool = False,
) -> None:
    """Run `kernel(*args, *constexprs)` on the current device, whose index is `device`.

    Without `fp_fusion` it rounds as the reference does, product and sum apart. A kernel's constexpr
    parameters come last, and it specialises no number (`do_not_specialize`).
    """
    key = _key(kernel, device, args, constexprs, num_warps, fp_fusion)
    form = None if key is None else _forms.get(key)
    if form is not None:
        form[programs, 1, 1](*args, *constexprs)
        return
    form = start_by_triton(kernel, programs, args, constexprs, num_warps, fp_fusion)
    if _KEEPS and key is not None and isinstance(form, CompiledKernel):
        _forms[key] = form


def start_by_triton(
    kernel: Any,
    programs: int,
    args: tuple[Tensor | int | float, ...],
    constexprs: tuple[int, ...],
    num_warps: int,
    fp_fusion: bool = False,
) -> Any:
    """Do the same as Triton does; return the compiled form, or what stands for it."""
    return kernel[(programs,)](*args, *constexprs, num_warps=num_warps, enable_fp_fusion=fp_fusion)


def _key(
    kernel: Any,
    device: int,
    args: tuple[Tensor | int | float, ...],
    constexprs: tuple[int, ...],
    num_warps: int,
    fp_fusion: bool,
) -> tuple[object, ...] | None:
    """Return all that a form depends on; None where a tensor is not aligned."""
    addresses = 0
    kinds: list[object] = []
    for arg in args:
        if isinstance(arg, int):
            kinds.append(-(2**31) <= arg < 2**31)  # Triton passes it in 32 bits, or in 64
        elif isinstance(arg, float):
            kinds.append(float)
        else:
            addresses |= arg.data_ptr()
            kinds.append(arg.dtype)
    if addresses % _ALIGNMENT:
        return None
    return (kernel.fn, device, constexprs, num_warps, fp_fusion, *kinds)
