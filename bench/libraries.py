"""The libraries that are compared, imported where they are installed."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import tritonimplicit
from bench.case import OURS, Absent

PEERS = {"TorchOpt": "torchopt"}
"""What a peer is called in tables, and what its module and its distribution are called."""
RECORDED = ("torch", "triton", "optree", "numpy", *PEERS.values())


def library(name: str) -> ModuleType | Absent:
    """Ours, or a peer's module; Absent, with the reason, where it cannot be imported."""
    if name == OURS:
        return tritonimplicit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a peer imports
            return importlib.import_module(PEERS[name])
    except ImportError as error:
        return Absent(name, f"not installed ({error})")
