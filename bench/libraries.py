"""The libraries that are compared, imported where they are installed."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType

import tritonimplicit
from bench.case import OURS, Absent


@dataclass(frozen=True)
class Peer:
    """A library's module and its distribution on PyPI; what to say where it is not found."""

    module: str
    distribution: str
    hint: str = "pip install -e '.[bench]'"


PEERS = {
    "TorchOpt": Peer("torchopt", "torchopt"),
    "torchdeq": Peer("torchdeq", "torchdeq"),
    # The distribution `hypergrad` on PyPI is another library, and so is `hypertorch`.
    "hypertorch": Peer(
        "hypergrad.hypergradients", "hypergrad", "not on PyPI: github.com/prolearner/hypertorch"
    ),
    "linear_operator": Peer("linear_operator", "linear_operator"),
    "JAXopt": Peer("jaxopt", "jaxopt"),
    "lineax": Peer("lineax", "lineax"),
}
"""By what they are called in tables."""
RECORDED = ("torch", "triton", "optree", "numpy", "jax", *(p.distribution for p in PEERS.values()))


def library(name: str) -> ModuleType | Absent:
    """Ours, or a peer's module; Absent, with the reason, where it cannot be imported."""
    if name == OURS:
        return tritonimplicit
    peer = PEERS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a peer imports
            return importlib.import_module(peer.module)
    except ImportError:
        return Absent(name, f"not installed ({peer.hint})")
