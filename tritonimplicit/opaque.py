"""Calls that torch.compile sees as one op: solvers loop on values, which no graph can.

The op stands inside an autograd Function's forward, so that the derivative rules around it stay
traceable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tritonimplicit.torch_internals import plain_dispatch

Call = Callable[[Sequence[Tensor]], Sequence[Tensor]]
F = TypeVar("F", bound=Callable[..., object])

# A compiled graph holds a call's number for as long as it lives, and nothing tells when it dies.
_CALLS: list[tuple[Call, Call]] = []

_LIBRARY = torch.library.Library("tritonimplicit", "FRAGMENT")
_LIBRARY.define("call(int handle, Tensor[] tensors) -> Tensor[]")


def opaque_call(run: Call, like: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Put `run(tensors)` into the graph that is being traced; `like(tensors)` has its shapes."""
    _CALLS.append((run, like))
    return tuple(torch.ops.tritonimplicit.call(len(_CALLS) - 1, list(tensors)))


def compilable(solver: F) -> F:
    """Let torch.compile(fullgraph=True) take in a function decorated by `custom_root`.

    The solver and the linear solve become one op each, which run as without compilation; the rest
    of the forward and backward pass is traced. Without this there is a graph break, and the numbers
    are right as well.

    Call it before torch.compile, not in the compiled function, which is an error under fullgraph.
    The initial guess must be a pytree of tensors of the solution's structure, shapes and dtypes;
    `has_aux` is not possible. A `.backward()` inside the compiled region needs
    `torch._dynamo.config.trace_autograd_ops = True`, and one *through* it a second time is not
    possible (pytorch#91469). Raises RuntimeError with torch older than 2.13.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("call compilable before torch.compile, not in the compiled function.")
    if torch.torch_version.TorchVersion(torch.__version__) < "2.13":
        raise RuntimeError(
            f"compilable needs torch 2.13 or newer, not {torch.__version__}, whose compiler cannot "
            "take such a function into its graph; without it torch.compile breaks the graph there."
        )
    from torch._dynamo import nonstrict_trace  # takes a second: only for those who compile

    return nonstrict_trace(solver)  # type: ignore[return-value]


def _run(handle: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    run, like = _CALLS[handle]
    with plain_dispatch(), torch.no_grad():
        results = [t.clone(memory_format=torch.contiguous_format) for t in run(tensors)]
        traced = [(t.shape, t.dtype) for t in like(tensors)]
    if [(t.shape, t.dtype) for t in results] != traced:
        raise RuntimeError(
            "the solver returned tensors of other shapes or dtypes than its initial guess, for "
            f"which the graph was compiled: {[(tuple(t.shape), t.dtype) for t in results]}."
        )
    return results


def _shapes(handle: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    _, like = _CALLS[handle]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like(tensors)]


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("call", _run, _key)
torch.library.register_fake("tritonimplicit::call", _shapes, lib=_LIBRARY)
