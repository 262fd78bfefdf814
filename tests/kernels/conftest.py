"""The `device` that a test of the Triton kernels runs on: the interpreter's CPU, or a GPU.

Triton decides at import whether it interprets, so that the two need processes of their own.
"""

from __future__ import annotations

import os

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = "gpu" if INTERPRETS else "interpreter"
    deselected = [item for item in items if item.get_closest_marker(unwanted)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
