"""A layer as one function, from the first evaluation of a forward pass to the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.diff.implicit.closures import Wording
from tritonimplicit.random_numbers import random_states, set_random_states

LayerTensors = tuple[dict[str, Tensor], dict[str, Tensor], tuple[Any, ...]]
"""Parameters, buffers, and the arguments after z."""


class FixedLayer:
    """(z, tensors) -> layer(z, *inputs), the same function at every evaluation.

    Each evaluation begins from the buffers in `tensors` and from the random numbers of this moment:
    there is one dropout mask, and no evaluation sees what another has done to a buffer. What the
    layer changes in itself is dropped; `settle` does it once. The result has z's dtypes, under
    autocast too.
    """

    def __init__(self, layer: Callable[..., TensorTree], device: torch.device):
        self._layer = layer
        self._random = _Random(device)
        self._modes = self._training()
        self._has_buffers = isinstance(layer, nn.Module) and any(True for _ in layer.buffers())
        self.evaluations = 0

    def tensors(self, inputs: tuple[Any, ...]) -> LayerTensors:
        """Return what the layer depends on; buffers as they are now."""
        if not isinstance(self._layer, nn.Module):
            return {}, {}, inputs
        buffers = {name: buffer.clone() for name, buffer in self._layer.named_buffers()}
        return dict(self._layer.named_parameters()), buffers, inputs

    def __call__(self, z: TensorTree, tensors: LayerTensors) -> TensorTree:
        """Evaluate the layer.

        Raises RuntimeError if it went from training to evaluation, or back, since the forward pass.
        """
        if self._training() != self._modes:
            raise RuntimeError(
                "the layer of a DEQ went from train() to eval(), or back, between the forward and "
                "the backward pass: it is another function now. Call backward() before."
            )
        self.evaluations += 1
        parameters, buffers, inputs = tensors
        with self._random.again():
            if isinstance(self._layer, nn.Module):
                own = {name: buffer.clone() for name, buffer in buffers.items()}
                image = functional_call(self._layer, {**parameters, **own}, (z, *inputs))
            else:
                image = self._layer(z, *inputs)
        return _like(image, z)

    def settle(self, z: TensorTree, inputs: tuple[Any, ...]) -> None:
        """Leave the layer and the random numbers as one evaluation at z leaves them."""
        if any(self._modes) and self._has_buffers:
            with torch.no_grad():
                self._layer(z, *inputs)
        else:
            self._random.advance()

    def _training(self) -> list[bool]:
        modules = self._layer.modules() if isinstance(self._layer, nn.Module) else ()
        return [module.training for module in modules]


FixedLayer.__call__.wording = Wording(  # type: ignore[attr-defined]
    "the layer of a DEQ",
    "neither its parameters nor arguments of the call",
    "give them as arguments, deq(x, w), or let the layer be a module with them, or detach them",
)


class _Random:
    """The random number generators of the CPU and of a device, as they are at this moment."""

    def __init__(self, device: torch.device):
        self._device = device
        self._before = self._after = random_states(device)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw the numbers that follow this moment, unseen outside."""
        outside = random_states(self._device)
        set_random_states(self._device, self._before)
        try:
            yield
            self._after = random_states(self._device)
        finally:
            set_random_states(self._device, outside)

    def advance(self) -> None:
        """Let the numbers of one `again` be drawn."""
        set_random_states(self._device, self._after)


def _like(image: TensorTree, z: TensorTree) -> TensorTree:
    """The image in z's dtypes; of another structure it is left for the solver to refuse."""
    leaves, spec = optree.tree_flatten(image)
    like, expected = optree.tree_flatten(z)
    if spec != expected or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return image
    cast = [leaf.to(z_leaf.dtype) for leaf, z_leaf in zip(leaves, like, strict=True)]
    return optree.tree_unflatten(spec, cast)
