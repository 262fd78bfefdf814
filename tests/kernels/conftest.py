"""Which backends a test of the kernels runs on.

Triton decides at import whether it interprets, so that tests in its interpreter need a process of
their own, with TRITON_INTERPRET=1; those on a GPU one without.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.problems import Target
from tritonimplicit_kernels import backend

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

TRITON = [
    pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
]
REFERENCE = pytest.param(("reference", "cpu"), id="reference")


def _target(request: pytest.FixtureRequest) -> Target:
    name, device = request.param
    return Target(backend(name, device, torch.float32), device)


@pytest.fixture(params=[REFERENCE, *TRITON])
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend, where it runs."""
    return _target(request)


@pytest.fixture(params=TRITON)
def triton_target(request: pytest.FixtureRequest) -> Target:
    """The Triton kernels, where they run."""
    return _target(request)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = "gpu" if INTERPRETS else "interpreter"
    deselected = [item for item in items if item.get_closest_marker(unwanted)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
