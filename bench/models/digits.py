"""Models of 8 x 8 images of digits: the demo's, with convolutions, and one of three scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.base import Model, Tensors, register

CONTRACTION = 0.95
"""The bound on the norm of the demo's convolution: its cell contracts."""


@register
class Conv(Model):
    """z = relu(GN(conv x) + W * z), 32 channels, as in examples/deq_digits.py."""

    name = "conv"
    singular: Tensor

    def __init__(self, channels: int = 32):
        super().__init__()
        self.inject = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(4, channels))
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5)
        pool = nn.Sequential(nn.AvgPool2d(2), nn.GroupNorm(4, channels), nn.Flatten())
        self.head = nn.Sequential(pool, nn.Linear(channels * 4 * 4, 10))
        self.register_buffer("singular", torch.randn(1, channels, 8, 8))

    @torch.no_grad()
    def normalise(self, steps: int) -> None:
        for _ in range(steps):
            image = F.conv2d(self.singular, self.weight, padding=1)
            image = F.conv_transpose2d(image, self.weight, padding=1)
            self.singular = image / image.norm()

    def inputs(self, x: Tensor) -> Tensors:
        norm = F.conv2d(self.singular / self.singular.norm(), self.weight, padding=1).norm()
        weight = self.weight * (CONTRACTION / norm.clamp(min=CONTRACTION))
        return self.inject(x), weight

    @staticmethod
    def cell(z: Tensor, *inputs: Tensor) -> Tensor:
        injection, weight = inputs
        return torch.relu(injection + F.conv2d(z, weight, padding=1))

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), *self.singular.shape[1:])

    def logits(self, z: Tensor) -> Tensor:
        logits: Tensor = self.head(z)
        return logits


WIDTHS, SIZES = (16, 24, 32), (8, 4, 2)
LENGTHS = [width * size**2 for width, size in zip(WIDTHS, SIZES, strict=True)]
NORM = 1.5
"""The bound on the joint norm of the multi-scale model's convolutions: no contraction."""


@register
class Multiscale(Model):
    """z_j = relu(inject_j(x) + sum over i of W_ij z_i): z is (B, 1536), scale after scale.

    From a finer scale i < j by average pooling and 3 x 3 kernels, from a coarser one by 1 x 1
    kernels and nearest neighbours, as in multi-scale DEQs (Bai, Koltun and Kolter 2020).
    """

    name = "multiscale"
    singular: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inject = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(4, width))
            for width in WIDTHS
        )
        scale = len(WIDTHS) ** -0.5
        self.kernels = nn.ParameterList(
            scale * torch.randn(*_kernel(i, j)) / _fan_in(i, j) ** 0.5
            for j in range(len(WIDTHS))
            for i in range(len(WIDTHS))
        )
        self.head = nn.Linear(sum(WIDTHS) * 4, 10)
        self.register_buffer("singular", torch.randn(1, sum(LENGTHS)))

    def normalise(self, steps: int) -> None:
        kernels = tuple(kernel.detach() for kernel in self.kernels)
        for _ in range(steps):
            start = self.singular.requires_grad_()
            with torch.enable_grad():
                image = _mix(start, kernels)
            (back,) = torch.autograd.grad(image, start, image.detach())
            self.singular = back / back.norm()

    def inputs(self, x: Tensor) -> Tensors:
        kernels = tuple(self.kernels)
        norm = _mix(self.singular.detach() / self.singular.detach().norm(), kernels).norm()
        scale = NORM / norm.clamp(min=NORM)
        injected = [
            block(F.avg_pool2d(x, 2**level)).flatten(1) for level, block in enumerate(self.inject)
        ]
        return torch.cat(injected, 1), *(scale * kernel for kernel in kernels)

    @staticmethod
    def cell(z: Tensor, *inputs: Tensor) -> Tensor:
        injected, *kernels = inputs
        return torch.relu(injected + _mix(z, kernels))

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), sum(LENGTHS))

    def logits(self, z: Tensor) -> Tensor:
        pooled = [F.adaptive_avg_pool2d(scale, 2).flatten(1) for scale in _scales(z)]
        logits: Tensor = self.head(torch.cat(pooled, 1))
        return logits


def _kernel(i: int, j: int) -> tuple[int, int, int, int]:
    side = 3 if i <= j else 1
    return WIDTHS[j], WIDTHS[i], side, side


def _fan_in(i: int, j: int) -> int:
    return WIDTHS[i] * (9 if i <= j else 1)


def _scales(z: Tensor) -> list[Tensor]:
    """(B, 1536) -> (B, width, size, size) for each scale."""
    parts = z.split(LENGTHS, 1)
    shapes = zip(parts, WIDTHS, SIZES, strict=True)
    return [part.unflatten(1, (width, size, size)) for part, width, size in shapes]


def _mix(z: Tensor, kernels: list[Tensor] | Tensors) -> Tensor:
    """sum over i of W_ij z_i, for each j: linear, (B, 1536) -> (B, 1536)."""
    scales, mixed = _scales(z), []
    for j in range(len(scales)):
        total = torch.zeros_like(scales[j])
        for i, scale in enumerate(scales):
            kernel = kernels[j * len(scales) + i]
            if i <= j:
                pooled = F.avg_pool2d(scale, 2 ** (j - i)) if i < j else scale
                total = total + F.conv2d(pooled, kernel, padding=1)
            else:
                total = total + F.interpolate(F.conv2d(scale, kernel), scale_factor=2 ** (i - j))
        mixed.append(total.flatten(1))
    return torch.cat(mixed, 1)
