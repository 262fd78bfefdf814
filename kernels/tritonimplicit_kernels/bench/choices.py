"""What the kernels' own choices cost or save: float64 dots, and launches by kept forms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels import triton as kernels
from tritonimplicit_kernels.bench.cases import BY_NAME, Size
from tritonimplicit_kernels.bench.clock import Run, Tensors, Times, in_turns
from tritonimplicit_kernels.bench.fp32_dots import fp32_dots
from tritonimplicit_kernels.bench.results import Comparison
from tritonimplicit_kernels.bench.runner import Plan
from tritonimplicit_kernels.bench.trial import NUMBERS, Trial, argument_names
from tritonimplicit_kernels.layout import MAX_P
from tritonimplicit_kernels.triton.start import start, start_by_triton

_CALLS: Final = 100
"""Launches that are timed together: fewer than a device's queue takes without waiting."""
_ROUNDS: Final = 20


def comparisons(device: torch.device, plan: Plan) -> Iterator[Comparison]:
    """Yield all of them."""
    for op in ("cg_dots", "cg_step"):
        yield launch_cost(op, device)
    for elements in plan.elements:
        yield dots_cost(elements, device)


def launch_cost(op: str, device: torch.device) -> Comparison:
    """Time the host at one launch: a kept form's, and Triton's own. The device has little to do."""
    trial = Trial(BY_NAME[op], Size(1, 64), torch.float32, device)
    values = trial.arguments | NUMBERS
    names = argument_names(op)
    kernel = getattr(import_module(f"{kernels.__name__}.{op}"), f"_{op}_kernel")
    args = (*(values[name] for name in names), 64 // 16, 1)
    rest = (1, args, (MAX_P, 2048), 8)  # programs, arguments, constexprs, warps, as in `launch`
    index = trial.arguments[names[0]].get_device()
    ways = {
        "kept form": partial(start, kernel, index, *rest),
        "triton": partial(start_by_triton, kernel, *rest),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(_ROUNDS + 1):
        for name, way in ways.items():
            taken = _host_seconds(way, device)
            if turn > 0:  # the first compiles
                seconds[name].append(taken / _CALLS)
    times = {name: Times.of(each) for name, each in seconds.items()}
    tensors = sum(name in trial.arguments for name in names)
    return Comparison(f"host's time of one {op}, {tensors} tensors", times)


def dots_cost(elements: int, device: torch.device) -> Comparison:
    """Time `cg_dots` and its like in float32 with scaling, both within float32's tolerance."""
    trial = Trial(BY_NAME["cg_dots"], Size.of(elements, 1), torch.float32, device)
    p, ap = trial.arguments["p"], trial.arguments["ap"]
    scales = torch.stack([row_scales(p), row_scales(ap)])
    dots = torch.empty_like(trial.arguments["dots"])

    def in_float32() -> Tensors:
        fp32_dots(p, ap, scales, dots)
        return (dots,)

    errors: dict[str, float] = {}

    def check(name: str, answer: Tensors) -> None:
        errors[name] = trial.error_of_ours(answer)

    ways: Mapping[str, Callable[[], Run]] = {"float64": trial.ours, "float32": lambda: in_float32}
    for prepare in ways.values():
        prepare()()
    seconds = in_turns(ways, device, _ROUNDS, check, queued=True)
    remark = "".join(f"; {name} errs by {error:.0e}" for name, error in errors.items())
    right = {name for name, error in errors.items() if error <= trial.tolerance}
    times = {name: Times.of(each) for name, each in seconds.items() if name in right}
    return Comparison(f"dots of {elements:.0e} float32 elements", times, remark)


def _host_seconds(way: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(_CALLS):
        way()
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return seconds


def row_scales(v: Tensor) -> Tensor:
    """Return powers of two (B,) that bring the largest element of each row to between 1/2 and 1."""
    _, exponents = torch.frexp(v.abs().amax(1))
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), -exponents)
