"""One CG iteration whose product comes in several tensors: copied into rows, or read in place.

Without a CUDA graph the table of their addresses goes to the device with each product. Whether that
is cheaper than one copy of the leaves decides what solvers do there; see docs/kernels.md.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from bench import textbook
from bench.case import Absent, Case, Entry, Problem, Run, Setting
from bench.steps import QUICK_ELEMENTS, KernelStep, Start
from tritonimplicit.vectors import Layout

COPIED, IN_PLACE = "copied into rows", "read in place"
TREES = {"4x2.5e6": (4, 2_500_000), "100x1e4": (100, 10_000), "1000x1e3": (1000, 1008)}


class CopiedStep(KernelStep):
    """A step of ours after a copy of the product's leaves, with one call for all."""

    def __init__(self, start: Start, leaves: list[Tensor]):
        super().__init__(start)
        self._leaves, self._layout = leaves, Layout.of(leaves)
        self._rows = self._layout.zeros()

    def product(self) -> Tensor:
        return self._layout.gather(self._leaves, lambda: self._rows, "the leaves")


class StepInPlace(KernelStep):
    """A step of ours that reads the product from its leaves, by a table made for it."""

    def __init__(self, start: Start, leaves: list[Tensor]):
        super().__init__(start)
        layout = Layout.of(leaves)
        self._leaves = [leaf[None] for leaf in leaves]
        self._tables = kernels.LeafTables(
            layout.starts, layout.sizes, layout.ld, layout.dtype, layout.device
        )

    def product(self) -> Tensor:
        return self._tables.table(self._leaves)


def entry(
    provider: str, kind: type[CopiedStep | StepInPlace], start: Start, count: int, repeats: int
) -> Entry:
    leaves = [leaf.clone() for leaf in start.ap[0].chunk(count)]
    steps = [kind(start, leaves) for _ in range(repeats)]

    def prepare() -> Run:
        for step in steps:
            step.reset()
        return lambda: [step() for step in steps][-1]

    return Entry(provider, prepare)


def build(count: int, size: int, setting: Setting) -> Problem:
    size = min(size, QUICK_ELEMENTS // count // 16 * 16) if setting.quick else size
    start = Start.after_two_iterations(1, count * size, setting.device)
    x, r, p, ap = start.rows(torch.float64)
    on_gpu = setting.device.type == "cuda"
    repeats = 10 if on_gpu else 1  # a single launch would time the host
    in_place = (
        entry(IN_PLACE, StepInPlace, start, count, repeats)
        if on_gpu
        else Absent(IN_PLACE, "tables are for the Triton kernels, on a GPU")
    )
    return Problem(
        about=f"{count} leaves of {size:,}, float32",
        expected=textbook.cg_step(x, r, p, ap, textbook.dot(r, r))[:3],
        # What n float32 roundings of a dot product add up to.
        tolerance=(count * size) ** 0.5 * torch.finfo(torch.float32).eps,
        entries=[entry(COPIED, CopiedStep, start, count, repeats), in_place],
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
