"""What the models have in common, and their weights on disk."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

Tensors: TypeAlias = tuple[Tensor, ...]

WEIGHTS = Path(__file__).parent / "weights"


class Model(nn.Module, abc.ABC):
    """z = cell(z, *inputs(x)) for a batch of samples, and a loss of z.

    The cell is a function of explicit tensors, so that every library sees the same function: what
    depends on parameters and on x alone (injections, normalised weights) is computed once, in
    `inputs`.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def inputs(self, x: Tensor) -> Tensors:
        """What the cell is given besides z."""

    @staticmethod
    @abc.abstractmethod
    def cell(z: Tensor, *inputs: Tensor) -> Tensor:
        """One evaluation of f, shaped as z: (B, ...)."""

    @abc.abstractmethod
    def start(self, x: Tensor) -> Tensor:
        """Zeros of z's shape."""

    @abc.abstractmethod
    def logits(self, z: Tensor) -> Tensor:
        """(..., classes)."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return nn.functional.cross_entropy(self.logits(z).flatten(0, -2), y.flatten())

    def normalise(self, steps: int) -> None:
        """Let power iterations, where there are any, follow the weights."""


MODELS: dict[str, type[Model]] = {}


def register(model: type[Model]) -> type[Model]:
    """Make `load` know of the model."""
    MODELS[model.name] = model
    return model


def save(model: Model) -> Path:
    """Round the weights to half precision, and write them down."""
    path = WEIGHTS / f"{model.name}.pt"
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, path)
    return path


def load(name: str, device: torch.device) -> Model:
    """The trained model of this name, in float32, for inference and gradients."""
    weights = torch.load(WEIGHTS / f"{name}.pt", weights_only=True, map_location=device)
    model = MODELS[name]().to(device)
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    return model.eval()
