"""What a test of the Triton kernels runs on, and which tests this process can run at all.

Triton decides at import whether it interprets, so the interpreter and a GPU need processes of their
own. Tests that this process cannot run are deselected.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = {"interpreter": INTERPRETS, "gpu": torch.cuda.is_available() and not INTERPRETS}


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """The device of a Triton kernel's tensors: the interpreter's CPU, or a GPU."""
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = [mark for mark, runnable in RUNNABLE.items() if not runnable]
    unwanted = [item for item in items if any(map(item.get_closest_marker, marks))]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = [item for item in items if item not in unwanted]
