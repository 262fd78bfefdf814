"""The networks whose hypergradients are taken, in torch and in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Tensors

CHANNELS, WAYS, SIDE = 32, 5, 28  # of 5-way 1-shot Omniglot


@dataclass(frozen=True)
class Network:
    """Logits of inputs, given parameters of these shapes; a batch of random data to go with it."""

    about: str
    shapes: tuple[tuple[int, ...], ...]
    classes: int
    batch: int
    inputs: tuple[int, ...]
    regularisation: float
    torch_logits: Callable[[Tensors, Tensor], Tensor]
    jax_logits: Callable[[Sequence[Any], Any], Any]


def _linear(params: Tensors, x: Tensor) -> Tensor:
    return F.linear(x, *params)


def _linear_jax(params: Sequence[Any], x: Any) -> Any:
    weight, bias = params
    return x @ weight.T + bias


def _mlp(params: Tensors, x: Tensor) -> Tensor:
    w1, b1, w2, b2 = params
    return F.linear(torch.tanh(F.linear(x, w1, b1)), w2, b2)


def _mlp_jax(params: Sequence[Any], x: Any) -> Any:
    import jax.numpy as jnp

    hidden = jnp.tanh(_linear_jax(params[:2], x))
    return _linear_jax(params[2:], hidden)


def _conv(params: Tensors, x: Tensor) -> Tensor:
    *kernels, weight, bias = params
    for kernel in kernels:
        x = torch.tanh(F.conv2d(x, kernel, stride=2, padding=1))
    return F.linear(x.flatten(1), weight, bias)


def _conv_jax(params: Sequence[Any], x: Any) -> Any:
    import jax

    *kernels, weight, bias = params
    for kernel in kernels:
        image = jax.lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1), (1, 1)])
        x = jax.numpy.tanh(image)
    return _linear_jax((weight, bias), x.reshape(len(x), -1))


_KERNEL = (CHANNELS, CHANNELS, 3, 3)

NETWORKS = {
    "linear": Network(
        "linear classifier 784-10, batch 64",
        ((10, 784), (10,)),
        classes=10,
        batch=64,
        inputs=(784,),
        regularisation=4.0,
        torch_logits=_linear,
        jax_logits=_linear_jax,
    ),
    "mlp": Network(
        "MLP 784-256-10, batch 64",
        ((256, 784), (256,), (10, 256), (10,)),
        classes=10,
        batch=64,
        inputs=(784,),
        regularisation=4.0,
        torch_logits=_mlp,
        jax_logits=_mlp_jax,
    ),
    "conv": Network(
        f"3 convolutions of {CHANNELS} channels, {WAYS}-way 1-shot images of 28 x 28",
        ((CHANNELS, 1, 3, 3), _KERNEL, _KERNEL, (WAYS, CHANNELS * 16), (WAYS,)),
        classes=WAYS,
        batch=WAYS,
        inputs=(1, SIDE, SIDE),
        regularisation=4.0,
        torch_logits=_conv,
        jax_logits=_conv_jax,
    ),
}
