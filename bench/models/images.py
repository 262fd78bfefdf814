"""The few images that the models of digits are measured on, and those they are trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

SAMPLE = Path(__file__).parent / "weights" / "digits.pt"
LEVELS = 16  # of grey


def sample(device: torch.device) -> tuple[Tensor, Tensor]:
    """64 images (64, 1, 8, 8) that no model was trained on, and their labels."""
    stored = torch.load(SAMPLE, weights_only=True, map_location=device)
    return stored["images"].float() / LEVELS, stored["labels"].long()


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, then those held out; of scikit-learn's 1,797."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / LEVELS).astype("float32").reshape(-1, 1, 8, 8)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    x, x_out, y, y_out = map(torch.from_numpy, split)
    return x, y, x_out, y_out


def save_sample(x: Tensor, y: Tensor) -> None:
    """Keep the first 64 of what is held out."""
    images = (x[:64] * LEVELS).round().to(torch.uint8)
    torch.save({"images": images, "labels": y[:64].to(torch.uint8)}, SAMPLE)
