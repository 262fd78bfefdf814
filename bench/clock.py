"""Seconds of one call, on either kind of device."""

from __future__ import annotations

import time

import torch

from bench.case import Run, Tensors


def timed(run: Run, device: torch.device) -> tuple[float, Tensors]:
    """Seconds until the device has done all of it, and what it returned."""
    if device.type != "cuda":
        start = time.perf_counter()
        answer = run()
        return time.perf_counter() - start, answer
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    answer = run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, answer
