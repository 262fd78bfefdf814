"""Seconds of one call, on either kind of device; several contenders in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Run: TypeAlias = Callable[[], Tensors]
Prepare: TypeAlias = Callable[[], Run]
"""Does what is not to be timed, and returns what is."""

_HEAD_START = 500_000
"""In cycles, a fraction of a millisecond: longer than a host takes to launch a contender's work."""


@dataclass(frozen=True)
class Times:
    """Seconds of one call: the median, the 20th and the 80th percentile of as many rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Take the percentiles of two or more times."""
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(seconds), fifths[3], len(seconds))


def timed(run: Run, device: torch.device, queued: bool = False) -> tuple[float, Tensors]:
    """Return the seconds until the device has done all of it, and what it returned.

    With `queued` a GPU begins when the host has launched all, so that the device's time alone
    counts; what waits for the device within the run would wait in vain for less.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        answer = run()
        return time.perf_counter() - start, answer
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    if queued:
        torch.cuda._sleep(_HEAD_START)
    begin.record()
    answer = run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, answer


def in_turns(
    contenders: Mapping[str, Prepare],
    device: torch.device,
    rounds: int,
    check: Callable[[str, Tensors], None],
    queued: bool = False,
) -> dict[str, list[float]]:
    """Time all of them, A B A B; each one's last answer is handed to `check`."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    for turn in range(rounds):
        for name, prepare in contenders.items():
            time_taken, answer = timed(prepare(), device, queued)
            seconds[name].append(time_taken)
            if turn == rounds - 1:
                check(name, answer)
            del answer
    return seconds
