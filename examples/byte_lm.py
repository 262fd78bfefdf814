"""A byte-level language model of infinite depth, a text for it, and what it has to beat.

`deq_lm.py` trains it; needs torch alone.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tritonimplicit.fixed_point import Anderson
from tritonimplicit.linear_solve import GMRES
from tritonimplicit.nn import DEQ, Implicit

BYTES = 256
BLOCK, EVERY = 4096, 40  # one block of so many bytes in so many is held out


# -- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes, and the tolerances (relative residuals of each sequence) of the two solves."""

    width: int = 128
    heads: int = 4
    context: int = 64
    forward_rtol: float = 1e-3
    backward_rtol: float = 1e-2
    maxiter: int = 30


class Block(nn.Module):
    """The layer z, x, u -> z: h = LN(x + z + O attention(W z + u)), LN(h + FF(h)).

    Given x in its residual stream, it is solvable from the first step of training to the last.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = weight_normed(width, 3 * width, bias=False)
        self.out = weight_normed(width, width)
        self.widen, self.narrow = weight_normed(width, 4 * width), weight_normed(4 * width, width)
        self.norm_attention, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """(B, T, d), (B, T, d), (B, T, 3d) -> (B, T, d)."""
        heads = (self.qkv(z) + u).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, d/heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d/heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = self.norm_attention(x + z + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm(h + self.narrow(F.gelu(self.widen(h))))  # type: ignore[no-any-return]


class ByteLM(nn.Module):
    """(B, T) bytes -> (B, T, 256) logits of the byte after each; T up to `config.context`.

    `deq.last` tells of the solves. A transformer of one layer, tied to itself: Bai, Kolter and
    Koltun, "Deep equilibrium models", NeurIPS 2019.
    """

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.config, width = config, config.width
        self.embed = nn.Embedding(BYTES, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.position = nn.Parameter(0.02 * torch.randn(config.context, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inject, self.inject_qkv = nn.Linear(width, width), nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, BYTES)
        # Trained, the layer is no contraction: Picard's iteration and Neumann's series diverge.
        backward = GMRES(rtol=config.backward_rtol, maxiter=config.maxiter, batch_ndim=1)
        self.deq = DEQ(
            Block(width, config.heads),
            solver=Anderson(rtol=config.forward_rtol, maxiter=config.maxiter, batch_ndim=1),
            gradient=Implicit(backward),
        )

    def forward(self, text: Tensor) -> Tensor:
        x = self.norm_in(self.embed(text) + self.position[: text.shape[1]])
        start = x.new_zeros(x.shape, dtype=self.position.dtype)  # also under autocast
        z = self.deq(self.inject(x), self.inject_qkv(x), z0=start)
        return self.head(self.norm_out(z))  # type: ignore[no-any-return]


def weight_normed(fan_in: int, fan_out: int, bias: bool = True) -> nn.Linear:
    """A linear layer whose rows have directions and lengths for parameters."""
    linear = nn.Linear(fan_in, fan_out, bias)
    nn.init.normal_(linear.weight, std=0.5 * fan_in**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    weight_norm(linear, dim=0)
    return linear


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    """Bits that each byte takes: (B, T, 256), (B, T) -> (B, T), in float32."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (loss / torch.tensor(2.0).log()).view(targets.shape)


def save(model: ByteLM, path: Path) -> None:
    """The weights alone, in half precision."""
    half = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"config": asdict(model.config), "weights": half}, path)


def load(path: Path, device: torch.device | str = "cpu") -> ByteLM:
    """A model that `save` has kept, in float32."""
    kept = torch.load(path, map_location=device, weights_only=True)
    model = ByteLM(Config(**kept["config"])).to(device)
    model.load_state_dict(kept["weights"])
    return model


# -- the text ------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Bytes to train on, in a row, and blocks (n, 4096) that are held out; both uint8."""

    train: Tensor
    held_out: Tensor

    def windows(self, context: int) -> tuple[Tensor, Tensor]:
        """All that fits of the held-out blocks, as inputs and targets (n, context), int64."""
        used = (BLOCK - 1) // context * context
        inputs, targets = self.held_out[:, :used], self.held_out[:, 1 : used + 1]
        return inputs.reshape(-1, context).long(), targets.reshape(-1, context).long()


def read(files: Sequence[Path] = ()) -> Text:
    """Read the files; without any, the modules of Python's standard library, a few megabytes.

    Every fortieth block of 4096 bytes is held out.

    Raises ValueError if there are fewer than 40 blocks.
    """
    chosen = files or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in chosen)
    blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    blocks = blocks[: len(text) // BLOCK * BLOCK].view(-1, BLOCK)
    if len(blocks) < EVERY:
        raise ValueError(f"{len(text)} bytes are no text to learn from: give {BLOCK * EVERY}.")
    held_out = torch.arange(len(blocks)) % EVERY == EVERY // 2
    return Text(blocks[~held_out].flatten(), blocks[held_out])


def batch(text: Text, size: int, context: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (size, context) from places that depend on seed and step alone."""
    places = torch.Generator().manual_seed(seed * 1_000_003 + step)
    start = torch.randint(len(text.train) - context, (size, 1), generator=places)
    rows = text.train[start + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


# -- what to beat --------------------------------------------------------------------------------


class NGrams:
    """Byte bigrams, and trigrams interpolated with them, counted on the text to train on.

    A bigram count has 0.1 added to it. The trigrams' distribution is (count + s bigram) /
    (total + s), a Dirichlet prior: MacKay and Peto, "A hierarchical Dirichlet language model",
    Natural Language Engineering 1, 1995.
    """

    def __init__(self, text: Tensor):
        a, b, c = (text[i : len(text) - 2 + i].long() for i in range(3))
        pairs = torch.bincount(b * BYTES + c, minlength=BYTES**2).view(BYTES, BYTES) + 0.1
        self.bigram = pairs.double() / pairs.double().sum(1, keepdim=True)
        self.totals = torch.bincount(a * BYTES + b, minlength=BYTES**2).view(BYTES, BYTES)
        self.triples, self.counts = ((a * BYTES + b) * BYTES + c).unique(return_counts=True)

    def bigram_bits(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Bits that each target takes, after the input at its place."""
        return -self.bigram[inputs, targets].log2()

    def trigram_bits(self, inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
        """The same after two bytes; where a row begins, after the last byte of the row before."""
        before = inputs.flatten().roll(1).view(inputs.shape)
        triples = (before * BYTES + inputs) * BYTES + targets
        place = torch.searchsorted(self.triples, triples).clamp(max=len(self.triples) - 1)
        count = torch.where(self.triples[place] == triples, self.counts[place], 0)
        prior = strength * self.bigram[inputs, targets]
        return -((count + prior) / (self.totals[before, inputs] + strength)).log2()
