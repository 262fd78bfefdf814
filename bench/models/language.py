"""A byte-level language model: one transformer block, weight-tied for ever."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from bench.models.base import Model, Tensors, register

WIDTH, HEADS, HIDDEN, CONTEXT, BYTES = 128, 4, 512, 64, 256


@register
class Language(Model):
    """h = LN(U x + z + O attention(W z + V x)), f(z) = LN(h + FF(h)); z is (B, T, 128).

    Once trained it does not contract, by far: the eigenvalue of df/dz of largest modulus is real,
    negative, and several in size.
    """

    name = "lm"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.norm_in, self.norm_out = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.inject = nn.Linear(WIDTH, 4 * WIDTH)  # into the residual stream, and into q, k, v
        self.qkv = _normalised(WIDTH, 3 * WIDTH, bias=False)
        self.out = _normalised(WIDTH, WIDTH)
        self.up, self.down = _normalised(WIDTH, HIDDEN), _normalised(HIDDEN, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.head = nn.Linear(WIDTH, BYTES)

    def inputs(self, x: Tensor) -> Tensors:
        embedded = self.norm_in(self.embedding(x) + self.position[: x.shape[1]])
        layers = (self.out, self.up, self.down, *self.norms)
        affine = [(layer.weight, layer.bias) for layer in layers]
        return self.inject(embedded), self.qkv.weight, *itertools.chain(*affine)

    @staticmethod
    def cell(z: Tensor, *inputs: Tensor) -> Tensor:
        injected, qkv_w, out_w, out_b, up_w, up_b, down_w, down_b, *norms = inputs
        stream, shift = injected.split([WIDTH, 3 * WIDTH], -1)
        mixed = F.linear(_attention(F.linear(z, qkv_w) + shift), out_w, out_b)
        h = F.layer_norm(stream + z + mixed, (WIDTH,), norms[0], norms[1])
        feed = F.linear(F.gelu(F.linear(h, up_w, up_b)), down_w, down_b)
        return F.layer_norm(h + feed, (WIDTH,), norms[2], norms[3])

    def start(self, x: Tensor) -> Tensor:
        return self.position.new_zeros(*x.shape, WIDTH)

    def logits(self, z: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm_out(z))
        return logits


def _normalised(fan_in: int, fan_out: int, bias: bool = True) -> nn.Module:
    """A linear layer with weight-normalised rows, smaller than usual at the start."""
    layer = nn.Linear(fan_in, fan_out, bias)
    nn.init.normal_(layer.weight, std=0.5 * fan_in**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    normalised: nn.Module = weight_norm(layer, dim=0)
    return normalised


def _attention(qkv: Tensor) -> Tensor:
    """Causal, (B, T, 3 C) -> (B, T, C); written out, as it is to be differentiable twice."""
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, C / H)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
    mixed: Tensor = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2)
