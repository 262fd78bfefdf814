"""The byte language model, its text, and the counting models that it has to beat."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SMALL = {"width": 16, "heads": 2, "context": 16}


@pytest.fixture(scope="module")
def byte_lm(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("byte_lm")


@pytest.fixture(scope="module")
def source() -> Path:
    return Path(__file__)


@pytest.fixture
def text(byte_lm, tmp_path) -> Any:
    """80 blocks, each of one number in two bytes, over and over."""
    path = tmp_path / "numbered"
    path.write_bytes(b"".join(bytes([k // 256, k % 256]) * 2048 for k in range(80)))
    return byte_lm.read([path])


def test_one_block_in_forty_is_held_out_and_never_trained_on(text):
    held_out = {int(block[1]) for block in text.held_out}
    assert held_out == {20, 60}
    assert not held_out & set(text.train[1::2].tolist())
    assert len(text.train) == 78 * 4096


def test_the_text_is_by_default_the_standard_library(byte_lm):
    text = byte_lm.read()
    whole = bytes(text.train.tolist())
    assert len(whole) > 1_000_000
    assert b"import collections" in whole


def test_too_short_a_text_is_an_error(byte_lm, source):
    with pytest.raises(ValueError, match="bytes are no text to learn from"):
        byte_lm.read([source])


def test_windows_tile_the_held_out_blocks(byte_lm, text):
    inputs, targets = text.windows(64)
    assert inputs.shape == targets.shape == (2 * 63, 64)
    torch.testing.assert_close(inputs[:, 1:], targets[:, :-1], rtol=0, atol=0)
    first = text.held_out[0, :65].long()
    assert inputs[0].equal(first[:-1]) and targets[0].equal(first[1:])


def test_batches_depend_on_seed_and_step_alone(byte_lm, text):
    x, y = byte_lm.batch(text, 8, 16, seed=3, step=5)
    torch.rand(7)
    again, _ = byte_lm.batch(text, 8, 16, seed=3, step=5)
    assert x.equal(again) and x[:, 1:].equal(y[:, :-1])
    assert not x.equal(byte_lm.batch(text, 8, 16, seed=3, step=6)[0])
    assert not x.equal(byte_lm.batch(text, 8, 16, seed=4, step=5)[0])


def test_ngrams_count(byte_lm, source):
    text = source.read_bytes()[:2000]
    counts = byte_lm.NGrams(torch.tensor(list(text), dtype=torch.uint8))
    row = torch.tensor([list(text[500:540])])
    inputs, targets = row[:, :-1], row[:, 1:]
    bigram = counts.bigram_bits(inputs, targets)[0]
    trigram = counts.trigram_bits(inputs, targets, strength=2.0)[0]
    pairs = Counter(itertools.pairwise(text[1:]))
    triples = Counter(zip(text, text[1:], text[2:], strict=False))
    for i in range(1, inputs.shape[1]):
        a, b, c = row[0, i - 1 : i + 2].tolist()
        first = sum(n for (left, _), n in pairs.items() if left == b)
        p = (pairs[b, c] + 0.1) / (first + 25.6)
        both = sum(n for (*left, _), n in triples.items() if left == [a, b])
        q = (triples[a, b, c] + 2 * p) / (both + 2)
        assert bigram[i].item() == pytest.approx(-math.log2(p))
        assert trigram[i].item() == pytest.approx(-math.log2(q))


def test_ngrams_are_distributions(byte_lm, source):
    counts = byte_lm.NGrams(torch.tensor(list(source.read_bytes()), dtype=torch.uint8))
    after_i = torch.full((256, 1), ord("i"))
    every = torch.arange(256)[:, None]
    for losses in (
        counts.bigram_bits(after_i, every),
        counts.trigram_bits(after_i, every, 8.0),
    ):
        assert (2**-losses).sum().item() == pytest.approx(1)


def test_bits_of_a_uniform_guess(byte_lm):
    targets = torch.arange(32).view(2, 16)
    torch.testing.assert_close(
        byte_lm.bits(torch.zeros(2, 16, 256), targets), torch.full((2, 16), 8.0)
    )


def test_no_byte_sees_those_after_it(byte_lm):
    torch.manual_seed(0)
    config = byte_lm.Config(**SMALL, forward_rtol=1e-6)
    model = byte_lm.ByteLM(config).eval()
    one = torch.randint(256, (1, 16))
    other = one.clone()
    other[0, 10:] = (other[0, 10:] + 1) % 256
    with torch.no_grad():
        a, b = model(one), model(other)
    # Two solves to 1e-6 of layers near contraction; the logits are of order 1.
    torch.testing.assert_close(a[:, :10], b[:, :10], rtol=0, atol=1e-4)
    assert (a[:, 10:] - b[:, 10:]).abs().max() > 0.1


def test_kept_weights_are_those_of_the_model_in_half_precision(byte_lm, tmp_path):
    torch.manual_seed(0)
    model = byte_lm.ByteLM(byte_lm.Config(**SMALL, backward_rtol=1e-3))
    byte_lm.save(model, tmp_path / "weights.pt")
    loaded = byte_lm.load(tmp_path / "weights.pt")
    assert asdict(loaded.config) == asdict(model.config)
    for (name, weight), (other, kept) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other and kept.dtype == torch.float32
        assert kept.equal(weight.half().float())


def test_the_weights_in_the_repository_are_a_trained_model(byte_lm):
    model = byte_lm.load(Path(byte_lm.__file__).parent / "weights" / "byte_lm.pt")
    model.deq.solver = replace(model.deq.solver, maxiter=100)
    text = byte_lm.read()
    inputs, targets = (t[::100] for t in text.windows(model.config.context))
    with torch.no_grad():
        losses = byte_lm.bits(model(inputs), targets)
    bigrams = byte_lm.NGrams(text.train).bigram_bits(inputs, targets)
    # About a bit apart, each byte with a standard deviation of three bits.
    assert losses.mean() < bigrams.mean() - 0.5
    assert not model.deq.last.forward.status.any()
    assert model.deq.last.spectral_radius().median() > 1.5  # no contraction
