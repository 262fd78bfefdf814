"""Normalised weights: what keeps a layer's Lipschitz constant in hand while it is trained."""

from __future__ import annotations

import math
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tritonimplicit.linear_solve.base import check_real

Layer = TypeVar("Layer", bound=nn.Module)

Linear: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def spectral_norm(layer: Layer, bound: float = 1.0) -> Layer:
    """Set the norm of the map of every Linear in `layer` to `bound`, of every Conv at most to it.

    By `torch.nn.utils.parametrizations.spectral_norm`, times the bound: the weight as a matrix
    (outputs, the rest) has that norm, as far as a power iteration a forward pass can tell. A
    convolution has up to sqrt(kernel elements) times the norm of that matrix (Tsuzuku, Sato and
    Sugiyama, "Lipschitz-margin training", NeurIPS 2018), by which its weight is divided: it may be
    well below the bound. Other modules stay as they are. Returns `layer`.

    Raises ValueError for a bound that is not positive, a module without Linear or Conv, a
    transposed convolution, and a padding that repeats elements (a circular one does beyond
    dilation * (kernel - 1) in a dimension), for which there is no such bound.
    """
    check_real("bound", bound)
    if bound <= 0:
        raise ValueError(f"bound must be positive, not {bound!r}.")
    for module in layer.modules():
        _check_bounded(module)
    found = _linear_modules(layer)
    for module in found:
        parametrizations.spectral_norm(module)
        elements = 1 if isinstance(module, nn.Linear) else math.prod(module.weight.shape[2:])
        scale = _Scale(bound / math.sqrt(elements))
        parametrize.register_parametrization(module, "weight", scale)
    return layer


def weight_norm(layer: Layer) -> Layer:
    """Make the weight of every Linear and Conv in `layer` w = g v / ‖v‖, for each output by itself.

    As `torch.nn.utils.parametrizations.weight_norm`, with the same entries in a `state_dict()`, but
    right to every order of derivative: the second one of torch 2.13 on a CPU is not. Other modules
    stay as they are. Returns `layer`.

    Raises ValueError for a module without Linear or Conv.

    Salimans and Kingma, "Weight normalization", NeurIPS 2016.
    """
    for module in _linear_modules(layer):
        parametrize.register_parametrization(module, "weight", _WeightNorm(), unsafe=True)
    return layer


class _Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:.4g}"


class _WeightNorm(nn.Module):
    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / _row_norms(v))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _row_norms(weight), weight


def _row_norms(v: Tensor) -> Tensor:
    """(outputs, ...) -> (outputs, 1, ...)."""
    norms: Tensor = torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)
    return norms


def _linear_modules(layer: nn.Module) -> list[Linear]:
    found: list[Linear] = [
        module for module in layer.modules() if isinstance(module, (nn.Linear, *_CONVOLUTIONS))
    ]
    if not found:
        raise ValueError(f"there is no Linear and no Conv in {type(layer).__name__}.")
    for module in found:
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"{module} has a parametrised weight already.")
    return found


def _check_bounded(module: nn.Module) -> None:
    if isinstance(module, _TRANSPOSED):
        raise ValueError(f"there is no bound for a {type(module).__name__}: normalise it yourself.")
    padding = getattr(module, "padding_mode", "zeros")
    if padding not in ("zeros", "circular"):
        raise ValueError(f"there is no bound for padding_mode={padding!r}: it repeats elements.")
    if isinstance(module, _CONVOLUTIONS) and padding == "circular" and _repeats(module):
        raise ValueError(
            f"there is no bound for {module}: a circular padding of more than dilation * (kernel - "
            "1) in all, in a dimension, repeats elements."
        )


def _repeats(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether, at stride 1, circular padding makes a dimension longer: outputs come twice."""
    if isinstance(module.padding, str):  # "same" or "valid"
        return False
    sizes = zip(module.padding, module.dilation, module.kernel_size, strict=True)
    return any(2 * pad > dilation * (kernel - 1) for pad, dilation, kernel in sizes)
