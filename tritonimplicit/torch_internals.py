"""Private parts of PyTorch that derivative rules need and that have no public name.

Used with torch 2.11 and 2.13; `tests/test_torch_internals.py` holds what each is used for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_PLAIN_KEYS = (
    torch._C._dispatch_tls_local_include_set(),
    torch._C._dispatch_tls_local_exclude_set(),
)
P = ParamSpec("P")
R = TypeVar("R")


def transforms_active() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, ...) is running."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def is_transformed(tensor: Tensor) -> bool:
    """Whether a torch.func transform has wrapped the tensor, at any level that is not over."""
    functorch: Any = torch._C._functorch
    wrapped: bool = functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped and not functorch.is_dead_tensor_wrapper(tensor)


def refuse_legacy_batched(cotangents: Iterable[Tensor | None]) -> None:
    """Raise RuntimeError in a backward pass that the old vmap of torch.autograd has batched."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    if any(t is not None and legacy(t) for t in cotangents):
        raise RuntimeError(
            "is_grads_batched=True, and vectorize=True in torch.autograd.functional, batch a "
            "backward pass by an old vmap that a custom Function has no rule for: use "
            "torch.func.jacrev, or torch.func.vmap over torch.func.vjp."
        )


def forward_ad_active() -> bool:
    """Whether a level of forward-mode AD is open."""
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode AD differentiates in the tensor, at the level that is open."""
    if not (forward_ad_active() and tensor.is_floating_point()):
        return False
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def has_derivative(tensor: Tensor) -> bool:
    """Whether anything is being differentiated, or vmapped, in the tensor."""
    recorded = tensor.requires_grad and torch.is_grad_enabled()
    return recorded or is_transformed(tensor) or has_tangent(tensor)


_GRAD_CODE = torch.func.grad(torch.sum).__code__


def is_gradient(fn: Callable[..., Any]) -> bool:
    """Whether `fn` is torch.func.grad of something by its first argument; False where in doubt.

    The Jacobian of such a function is a Hessian, and symmetric.
    """
    if getattr(fn, "__code__", None) is not _GRAD_CODE:
        return False
    cells = zip(_GRAD_CODE.co_freevars, fn.__closure__ or (), strict=True)
    settings = {name: cell.cell_contents for name, cell in cells}
    return settings.get("argnums") == 0 and settings.get("has_aux") is False


def is_watched(tensor: Tensor) -> bool:
    """Whether autograd, forward-mode AD or a transform differentiates or vmaps the tensor.

    Unlike `is_transformed`, not whether a transform has merely wrapped it.
    """
    if has_tangent(tensor):
        return True
    while not tensor.requires_grad and is_transformed(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def in_trace() -> bool:
    """Whether AOTAutograd is tracing, below Dynamo: tensors have shapes and no values."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def plain_dispatch() -> AbstractContextManager[None]:
    """Dispatch as in a fresh thread: inside an op that AOTAutograd calls, autograd works again."""
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(*_PLAIN_KEYS)
    return guard


def untraced(rule: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile's tracer out of `rule`: a graph break instead of a dropped jvp.

    Dynamo traces a custom Function without its jvp rule (pytorch#192985). Unlike
    torch.compiler.disable this does not import the compiler.
    """
    wrapped: Callable[P, R] = torch._disable_dynamo(rule)  # type: ignore[attr-defined]
    return wrapped


def forward_rule(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's jvp nest: `jvp(ctx, saved, *tangents)`, with this level's saved tensors.

    PyTorch switches forward AD off inside a Function's jvp, which turns the outer levels' tangents
    into zeros without a word (pytorch#197867). Here it is on again, and this level's tangents are
    taken off the saved tensors.
    """

    @functools.wraps(jvp)
    def rule(ctx: Any, *tangents: Any) -> Any:
        forward_ad: Any = torch.autograd.forward_ad
        with forward_ad._set_fwd_grad_enabled(transforms_active()):
            return jvp(ctx, _primals(ctx.saved_tensors), *tangents)

    return rule


def _primals(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    unpack: Any = torch._VF._unpack_dual
    return tuple(unpack(t, level=0)[0] if t.is_floating_point() else t for t in tensors)
