"""One CG iteration whose product comes in several tensors: copied into rows, or read in place.

Without a CUDA graph the table of their addresses goes to the device with each product. Whether that
is cheaper than one copy of the leaves decides what solvers do there; see docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from bench.case import Absent, Case, Entry, Problem, Run, Setting, Tensors
from bench.steps import QUICK_ELEMENTS, in_a_row
from tritonimplicit.vectors import Layout
from tritonimplicit_kernels.bench.cases import BY_NAME, Size
from tritonimplicit_kernels.bench.clock import Prepare
from tritonimplicit_kernels.bench.trial import NUMBERS, Trial, argument_names

COPIED, IN_PLACE = "copied into rows", "read in place"
TREES = {"4x2.5e6": (4, 2_500_000), "100x1e4": (100, 10_000), "1000x1e3": (1000, 1008)}


def leaves_of(trial: Trial, count: int) -> list[Tensor]:
    """The product of the trial, in as many tensors of their own."""
    return [leaf.clone() for leaf in trial.arguments["ap"][0].chunk(count)]


def copied(trial: Trial, count: int) -> Callable[[], Tensor]:
    """Return what copies the leaves into rows, with one call for all."""
    leaves = leaves_of(trial, count)
    layout = Layout.of(leaves)
    rows = layout.zeros()
    views = layout.views(rows)

    def copy() -> Tensor:
        torch._foreach_copy_(views, leaves)
        return rows

    return copy


def in_place(trial: Trial, count: int) -> Callable[[], Tensor]:
    """Return what makes a table of the leaves."""
    leaves = leaves_of(trial, count)
    layout = Layout.of(leaves)
    tables = kernels.LeafTables(layout.starts, layout.sizes, layout.ld, layout.dtype, layout.device)
    return lambda: tables.table([leaf[None] for leaf in leaves])


def on_product(trial: Trial, product: Callable[[], Tensor]) -> Prepare:
    """A step of ours whose product is made anew."""
    backend = kernels.backend("auto", trial.arguments["x"].device, torch.float32)
    ops = [(getattr(backend, name), argument_names(name)) for name in trial.case.launches]

    def prepare() -> Run:
        trial.ours()  # begins afresh

        def run() -> Tensors:
            values = trial.arguments | NUMBERS | {"ap": product()}
            for launch, names in ops:
                launch(*(values[name] for name in names))
            return tuple(trial.arguments[name] for name in trial.case.results)

        return run

    return prepare


def build(count: int, size: int, setting: Setting) -> Problem:
    size = min(size, QUICK_ELEMENTS // count // 16 * 16) if setting.quick else size
    on_gpu = setting.device.type == "cuda"
    repeats = 10 if on_gpu else 1  # a single launch would time the host
    of_size = Size(1, count * size)
    trials = [Trial(BY_NAME["cg"], of_size, torch.float32, setting.device) for _ in range(repeats)]

    def entry(provider: str, product: Callable[[Trial, int], Callable[[], Tensor]]) -> Entry:
        prepares = [on_product(trial, product(trial, count)) for trial in trials]
        return Entry(provider, in_a_row(prepares))

    absent = Absent(IN_PLACE, "tables are for the Triton kernels, on a GPU")
    return Problem(
        about=f"{count} leaves of {size:,}, float32",
        expected=trials[0].expected[:3],
        tolerance=trials[0].tolerance,
        entries=[entry(COPIED, copied), entry(IN_PLACE, in_place) if on_gpu else absent],
        repeats=repeats,
    )


CASES = [
    Case(
        f"leaves/{name}",
        f"one CG iteration after a product in {name} leaves",
        partial(build, *tree),
    )
    for name, tree in TREES.items()
]
