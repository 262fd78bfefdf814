"""Three small deep equilibrium models with trained weights, for the family `deq`."""

from bench.models import digits, language
from bench.models.base import MODELS, Model, load, save

__all__ = ["MODELS", "Model", "digits", "language", "load", "save"]
