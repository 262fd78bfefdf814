"""The state of PyTorch's own random number generators, those that layers draw from."""

from __future__ import annotations

import torch
from torch import Tensor


def random_states(device: torch.device) -> list[Tensor]:
    """Return the generators' states, of the CPU and of the device: byte tensors on the host.

    The host keeps them, so that a GPU is not waited for.
    """
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Bring the generators into states that `random_states` has returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
