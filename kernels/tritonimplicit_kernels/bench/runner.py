"""Checks both answers, then times what is right, in turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from tritonimplicit_kernels.bench.cases import Case, Size
from tritonimplicit_kernels.bench.clock import Tensors, Times, in_turns, timed
from tritonimplicit_kernels.bench.results import Row
from tritonimplicit_kernels.bench.trial import Trial

OURS: Final = "ours"
UNFUSED: Final = "unfused"
MIN_ROUNDS: Final = 7


@dataclass(frozen=True)
class Plan:
    """Which sizes, and how long: `seconds` a row, and `rounds` at most."""

    elements: tuple[int, ...]
    systems: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    seconds: float
    rounds: int
    copied: int  # elements of the vector whose copy tells the bandwidth

    @classmethod
    def on(cls, device: torch.device, quick: bool) -> Plan:
        """Return the plan of a device."""
        dtypes = (torch.float32, torch.float64)
        if device.type == "cuda":
            if quick:
                return cls((10**4, 10**6, 10**8), (1, 64), dtypes, 0.2, 50, 10**8)
            elements = tuple(10**k for k in range(4, 9))
            return cls(elements, (1, 32, 1024), dtypes, 0.5, 200, 10**8)
        if quick:
            return cls((10**4, 10**6), (1, 64), dtypes, 0.1, 20, 10**7)
        return cls(tuple(10**k for k in range(4, 8)), (1, 32, 1024), dtypes, 2.0, 200, 10**8)

    def sizes(self, case: Case) -> Iterator[tuple[torch.dtype, Size]]:
        """Yield every dtype and size of a case."""
        sizes = [Size.of(*each) for each in itertools.product(self.elements, self.systems)]
        if case.sizes:
            sizes = [size for size in case.sizes if size.systems <= max(self.systems)]
        yield from itertools.product(self.dtypes, sizes)


def copy_bandwidth(plan: Plan, device: torch.device) -> float:
    """Return the bytes a second, read and written, of the fastest fifth of a vector's copies."""
    source = torch.ones(plan.copied, device=device)
    target = torch.empty_like(source)

    def run() -> Tensors:
        return (target.copy_(source),)

    def check(_: str, answer: Tensors) -> None:
        assert torch.equal(answer[0], source)

    seconds = in_turns({"copy": lambda: run}, device, 20, check, queued=True)["copy"]
    return 2 * source.nbytes / Times.of(seconds).p20


def measure(
    case: Case, size: Size, dtype: torch.dtype, device: torch.device, plan: Plan, copied: float
) -> Row:
    """Gate before clock: an answer that is wrong gets no time."""
    row = Row(
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        systems=size.systems,
        n=size.n,
        passes=case.passes,
        tolerance=(32 + size.n**0.5) * torch.finfo(dtype).eps,
    )
    try:
        trial = Trial(case, size, dtype, device)
        return _timed(row, trial, device, plan, copied)
    except torch.OutOfMemoryError:
        return replace(row, remark="not enough memory")


def _timed(row: Row, trial: Trial, device: torch.device, plan: Plan, copied: float) -> Row:
    contenders = {OURS: trial.ours, UNFUSED: trial.unfused}
    errors: dict[str, float] = {}

    def check(name: str, answer: Tensors) -> None:
        error = trial.error_of_ours(answer) if name == OURS else trial.error(answer)
        errors[name] = math.nan if math.isnan(error) else max(error, errors.get(name, 0.0))

    lap = 0.0
    for name, prepare in contenders.items():
        prepare()()  # compiles, and warms up
        seconds, answer = timed(prepare(), device)
        lap += seconds
        check(name, answer)
    if all(error <= trial.tolerance for error in errors.values()):
        rounds = max(MIN_ROUNDS, min(plan.rounds, int(plan.seconds / lap)))
        taken = in_turns(contenders, device, rounds, check, queued=True)
    row = replace(row, error=errors[OURS], unfused_error=errors[UNFUSED])
    wrong = [name for name, error in errors.items() if not error <= trial.tolerance]
    if wrong:
        return replace(row, remark=f"wrong answer, not timed: {', '.join(wrong)}")
    times = {name: Times.of(seconds) for name, seconds in taken.items()}
    bandwidth = trial.bytes / times[OURS].p50
    return replace(
        row,
        ours=times[OURS],
        unfused=times[UNFUSED],
        bandwidth=bandwidth,
        fraction=bandwidth / copied,
    )


def measure_all(
    cases: Sequence[Case], device: torch.device, plan: Plan, copied: float
) -> Iterator[Row]:
    """Yield the rows of all cases and sizes."""
    for case in cases:
        for dtype, size in plan.sizes(case):
            yield measure(case, size, dtype, device, plan, copied)
