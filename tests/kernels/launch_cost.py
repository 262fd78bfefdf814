"""What the host does for a launch, up to the driver's call: `python -m tests.kernels.launch_cost`.

The kernels are compiled for a GPU that is not there, and launches are written down: what is timed
is finding the compiled form and handing it its arguments, by a kept form and by Triton.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from tests.kernels.offline import Launches, kernel_called, launches_written_down
from tools.op_arguments import arguments
from tritonimplicit_kernels import triton as kernels
from tritonimplicit_kernels.triton import start as starting

OPS = ("cg_dots", "cg_step", "neumann_step")
CALLS = 3000


def microseconds(call: Callable[[], object], seen: Launches) -> float:
    """The median of many calls."""
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
        seen.made.clear()
    return statistics.median(seconds) * 1e6


def main() -> None:
    for op in OPS:
        with launches_written_down() as seen:
            args = arguments(op, torch.float32, batch=2, ld=64, partials=2).values()
            getattr(kernels, op)(*args)
            ((fn, device, constexprs, warps, *_),) = starting._forms
            kernel = kernel_called(f"_{op}_kernel")
            assert kernel.fn is fn
            launch = 4, (*args, 4, 2), constexprs, warps
            ours = microseconds(partial(starting.start, kernel, device, *launch), seen)
            theirs = microseconds(partial(starting.start_by_triton, kernel, *launch), seen)
            print(f"{op}: {ours:.1f} us by a kept form, {theirs:.1f} us by Triton")


if __name__ == "__main__":
    main()
