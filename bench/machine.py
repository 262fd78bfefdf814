"""What the numbers depend on besides the code."""

from __future__ import annotations

from typing import Any

import torch

import tritonimplicit
from bench.case import OURS
from bench.libraries import RECORDED
from tritonimplicit_kernels.bench import machine


def environment(device: torch.device, quick: bool) -> dict[str, Any]:
    """Machine, versions of ours and of the peers, commit, date and threads."""
    found = machine.environment(device, quick, RECORDED)
    return found | {"versions": {OURS: tritonimplicit.__version__} | found["versions"]}
