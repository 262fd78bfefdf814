"""Autocast around the derivatives of a call: the optimality as in the forward pass, else none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


class AutocastState:
    """The autocast settings of this moment, on the devices of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]):
        devices = {t.device.type for t in tensors}
        self._settings = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in sorted(devices)
            if torch.amp.is_autocast_available(device)
        ]

    def again(self) -> AbstractContextManager[object]:
        """Restore the settings: a derivative is that of the function which the solver saw."""
        return self._enter(off=False)

    def off(self) -> AbstractContextManager[object]:
        """Switch autocast off: in low precision no linear solve meets its tolerance."""
        return self._enter(off=True)

    def _enter(self, off: bool) -> AbstractContextManager[object]:
        stack = contextlib.ExitStack()
        for device, dtype, was_enabled in self._settings:
            enabled = was_enabled and not off
            if enabled or torch.is_autocast_enabled(device):
                # No cache: what is cast under one transform is not that of another.
                stack.enter_context(
                    torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
                )
        return stack
