"""Gradient descent for inner loops, functional (`sgd`) and stateful (`SGD`), and two helpers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import optree
import torch
from optree import PyTree
from torch import Tensor, nn

CopyMode: TypeAlias = Literal["reference", "copy", "deepcopy"]
TensorTree: TypeAlias = "PyTree[Tensor | None]"
T = TypeVar("T")


@dataclass(frozen=True)
class FunctionalSGD:
    """Stochastic gradient descent on pytrees of tensors; `sgd` makes one.

    One step with the gradient g at p: g <- g + weight_decay p; v <- momentum v + g, where v starts
    as the first g; the update is -lr v. This is `torch.optim.SGD` without dampening.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("lr", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                raise TypeError(f"sgd: {name} must be a number, not a {type(value).__name__}.")
            if not value >= 0:
                raise ValueError(f"sgd: {name} must not be negative, not {value!r}.")

    def init(self, params: TensorTree) -> TensorTree:
        """Return the state before the first step: a tree like `params`, of None."""
        return optree.tree_map(lambda _: None, params)

    def update(
        self,
        grads: TensorTree,
        state: TensorTree,
        *,
        params: TensorTree | None = None,
        inplace: bool = True,
    ) -> tuple[TensorTree, TensorTree]:
        """Return the updates, for `apply_updates`, and the next state, both structured as `grads`.

        `inplace` means that no graph is wanted; without it the updates are differentiable in
        gradients, state and parameters. Either way they are new tensors, for gradients may share
        memory. A gradient of None stays None. `params` is needed for weight decay alone.

        Raises:
            ValueError: weight decay without `params`, or trees of different structure.
        """
        if self.weight_decay and params is None:
            raise ValueError("sgd: weight decay needs the parameters: update(..., params=params).")

        def velocity(grad: Tensor | None, buffer: Tensor | None, param: Tensor) -> Tensor | None:
            if grad is None:
                return buffer
            if self.weight_decay:
                grad = grad + self.weight_decay * param
            if buffer is not None:
                return grad + self.momentum * buffer
            return grad.clone() if self.momentum else grad  # a buffer outlives the gradient

        with torch.set_grad_enabled(torch.is_grad_enabled() and not inplace):
            steps = _tree_map(velocity, grads, state, grads if params is None else params)
            # A parameter without a gradient is not moved, whatever its momentum.
            updates = _tree_map(lambda g, v: None if g is None else -self.lr * v, grads, steps)
        return updates, steps if self.momentum else state


def sgd(lr: float, momentum: float = 0.0, *, weight_decay: float = 0.0) -> FunctionalSGD:
    """Return functional gradient descent: `state = init(params)`, then `update(grads, state)`.

    Raises:
        TypeError: a setting that is no number (a schedule, for example).
        ValueError: a negative setting.
    """
    return FunctionalSGD(lr, momentum, weight_decay)


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` with the parameter order of TorchOpt's class of this name."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )


def apply_updates(params: TensorTree, updates: TensorTree, *, inplace: bool = True) -> TensorTree:
    """Return params + updates; an update of None leaves its parameter as it is.

    `inplace` changes the given tensors outside of any graph (autograd's version check sees it);
    without it the results are new tensors, differentiable in both.

    Raises:
        ValueError: trees of different structure.
    """

    def apply(param: Tensor, update: Tensor | None) -> Tensor:
        if update is None:
            return param
        return param.add_(update) if inplace else param + update

    with torch.set_grad_enabled(torch.is_grad_enabled() and not inplace):
        return _tree_map(apply, params, updates)


def module_clone(
    target: T,
    *,
    by: CopyMode = "reference",
    detach_buffers: bool = False,
    device: torch.device | str | int | None = None,
) -> T:
    """Return a copy of a module or of a pytree of tensors; `by` says how its tensors are made.

    "reference": the same tensors; "copy": clones with a graph to the originals; "deepcopy":
    detached clones that require grad where the originals do. The meta-parameters of a module count
    among its tensors. `detach_buffers` makes detached clones of a module's buffers, whatever `by`
    is. `device` is where the copy's tensors go.

    Raises:
        TypeError: a leaf of `target` that is no tensor.
        ValueError: an unknown `by`.
    """
    if by not in get_args(CopyMode):
        modes = ", ".join(map(repr, get_args(CopyMode)))
        raise ValueError(f"module_clone: by must be one of {modes}, not {by!r}.")

    def replica(tensor: object, by: CopyMode = by) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                "module_clone copies a module or a pytree of tensors, "
                f"but found a {type(tensor).__name__}."
            )
        if by == "reference":
            return tensor.to(device)
        if by == "copy":
            return tensor.clone().to(device)
        detached = tensor.detach().clone().to(device).requires_grad_(tensor.requires_grad)
        return nn.Parameter(detached, tensor.requires_grad) if _is_parameter(tensor) else detached

    if not isinstance(target, nn.Module):
        return optree.tree_map(replica, target)  # type: ignore[arg-type, return-value]
    buffer_mode: CopyMode = "deepcopy" if detach_buffers else by
    tensors: dict[int, Any] = {}
    for module in _with_meta_modules(target):
        tensors.update({id(p): replica(p) for p in module.parameters()})
        tensors.update({id(b): replica(b, buffer_mode) for b in module.buffers()})
    # deepcopy takes what its memo holds for the copy of that object: here, the replicas.
    return copy.deepcopy(target, tensors)


def _with_meta_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Iterate over a module and what it and its submodules keep apart from their submodules.

    That is what torch's own walks do not see, such as the meta-parameters of an implicit module.
    """
    yield module
    for owner in module.modules():
        for apart in vars(owner).values():
            if isinstance(apart, nn.Module):
                yield from _with_meta_modules(apart)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _tree_map(fn: Callable[..., Tensor | None], tree: TensorTree, *rests: TensorTree) -> TensorTree:
    """Map over trees whose leaves may be None."""
    return optree.tree_map(fn, tree, *rests, none_is_leaf=True)
