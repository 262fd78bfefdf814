"""Which backends a test of the kernels runs on."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.problems import Target
from tritonimplicit_kernels import backend

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
