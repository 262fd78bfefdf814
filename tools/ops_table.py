"""Write the table of ops in docs/kernels.md: launches, passes and flops, as counted in a run.

Run it with TRITON_INTERPRET=1: every load, store and float operation of Triton's interpreter is
counted. A test holds the table in the docs against a new count.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder as builder

from tools.op_arguments import arguments
from tritonimplicit_kernels import LeafTables, ops
from tritonimplicit_kernels import triton as kernels
from tritonimplicit_kernels.layout import PRODUCT, SHAPES

PAGE = Path(__file__).parents[1] / "docs/kernels.md"
BEGIN, END = "<!-- tools/ops_table.py writes this -->\n", "<!-- up to here -->\n"
ITERATIONS = {
    "`CG`": ("cg_dots", "cg_step"),
    "`CG(M=Jacobi())`": ("pcg_dots", "pcg_step"),
    "`Neumann`": ("neumann_step",),
    "`GMRES`, k vectors": ("multi_dot", "arnoldi_project", "arnoldi_step"),
    "`Anderson`, k differences": ("anderson_dots", "anderson_mix"),
    "`BiCGSTAB`": (
        *("bicgstab_dots", "bicgstab_half_step", "bicgstab_half_dots"),
        "bicgstab_step",
    ),
    "`BiCGSTAB(M=...)`": (
        *("bicgstab_dots", "bicgstab_half_step", "bicgstab_half_dots"),
        "pbicgstab_step",
    ),
}
"""The ops of one iteration, in their order."""
SOLVES = ("dense_cg",)
"""Ops that do a whole solve, and whose passes are over the matrix."""
_FLOPS = ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_fma")
# Whole blocks only, several a program: no lane is masked.
_BATCH, _LD, _PARTIALS = 2, 2**14, 2
_COUNTS = 7, 15  # vectors in a basis, with room for one more: no lane of a tile is masked but its


@dataclass
class Count:
    """What one op, or several, do to vectors; passes are the elements moved over a vector's."""

    launches: int = 0
    reads: float = 0.0
    writes: float = 0.0
    flops: float = 0.0  # an element

    @property
    def passes(self) -> float:
        return self.reads + self.writes

    def __add__(self, other: Count) -> Count:
        return Count(
            self.launches + other.launches,
            self.reads + other.reads,
            self.writes + other.writes,
            self.flops + other.flops,
        )


@dataclass
class Meter:
    """Counts elements of `vectors` that are loaded and stored, and operations on blocks."""

    vectors: list[Tensor]
    launches: int = 0
    loaded: int = 0
    stored: int = 0
    operations: int = 0

    @property
    def total(self) -> Count:
        n = self.vectors[0].numel()
        return Count(self.launches, self.loaded / n, self.stored / n, self.operations / n)

    def elements(self, ptrs: Any, mask: Any) -> int:
        """The number of vector elements at these addresses."""
        addresses = ptrs.data[mask.data]
        found = 0
        for vector in self.vectors:
            start = vector.data_ptr()
            found += int(((addresses >= start) & (addresses < start + vector.nbytes)).sum())
        return found

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what the interpreter does in this context."""
        load, store, grid = (
            getattr(builder, name)
            for name in ("create_masked_load", "create_masked_store", "set_grid_dim")
        )

        def count_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.loaded += self.elements(ptrs, mask)
            return load(ptrs, mask, *rest)

        def count_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.stored += self.elements(ptrs, mask)
            return store(ptrs, value, mask, *rest)

        def count_launch(*sizes: int) -> None:
            self.launches += 1
            grid(*sizes)

        counted = {name: self._counted(getattr(builder, name)) for name in _FLOPS}
        counted |= {
            "create_masked_load": count_load,
            "create_masked_store": count_store,
            "set_grid_dim": count_launch,
        }
        with mock.patch.multiple(builder, **counted):
            yield

    def _counted(self, operation: Any) -> Any:
        def count(*operands: Any) -> Any:
            result = operation(*operands)
            if result.data.size > 1:  # a block's, not a scalar's
                self.operations += result.data.size
            return result

        return count


def count(op: str, k: int = _COUNTS[0], in_leaves: bool = False) -> Count:
    """Run `op` in the interpreter, on systems that all run and have k vectors, and count.

    With `in_leaves` each product is read from two leaves: together a vector.
    """
    values = arguments(op, torch.float32, _BATCH, _LD, _PARTIALS, k)
    if not in_leaves:
        return count_on(op, values)
    tables = LeafTables([0, _LD // 2], [_LD // 2] * 2, _LD, torch.float32, "cpu")
    products = {name: torch.ones(2, _BATCH, _LD // 2).unbind() for name in PRODUCT & values.keys()}
    assert products, f"{op} reads no product"
    values |= {name: tables.table(leaves) for name, leaves in products.items()}
    return count_on(op, values, list(itertools.chain(*products.values())))


def count_on(
    op: str, values: dict[str, Tensor | int | float], leaves: Sequence[Tensor] = ()
) -> Count:
    """Run `op` on these arguments in the interpreter, and count; `leaves` are vectors too."""
    passes = ("B, ld", "K, B, ld", "B, n, n")
    vectors = [v for name, v in values.items() if SHAPES.get(name) in passes]
    found = [v for v in (*vectors, *leaves) if isinstance(v, Tensor)]
    meter = Meter([v for v in found if v.is_floating_point()])  # a table is no vector
    with meter.running():
        getattr(kernels, op)(*values.values())
    return meter.total


def count_iteration(method: str, k: int = _COUNTS[0], in_leaves: bool = False) -> Count:
    return sum((count(op, k, in_leaves) for op in ITERATIONS[method]), Count())


def in_k(low: float, high: float) -> str:
    """Show what is counted with the fewer and the more vectors as a function a k + b of k."""
    fewer, more = _COUNTS
    # Scalars of a system, counted as operations too, are far below a tenth an element.
    slope = round((high - low) / (more - fewer), 1)
    if slope == 0:
        return f"{low:g}"
    rest = round(low - slope * fewer, 1)
    return f"{'' if slope == 1 else f'{slope:g} '}k" + (f" + {rest:g}" if rest else "")


def table() -> str:
    """Return the two tables in Markdown."""
    lines = [
        "| op | launches | vectors read | written | passes | flops an element | a float32 byte |",
        "|---|---|---|---|---|---|---|",
    ]
    for op in ops.SCHEMAS:
        if op in SOLVES:
            continue
        c, more = (count(op, k) for k in _COUNTS)
        reads, writes, passes, flops = (
            in_k(getattr(c, name), getattr(more, name))
            for name in ("reads", "writes", "passes", "flops")
        )
        lines.append(
            f"| `{op}` | {c.launches} | {reads} | {writes} | {passes} "
            f"| {flops} | {c.flops / (4 * c.passes):.2f} |"
        )
    lines += ["", "| an iteration of | ops | launches | passes |", "|---|---|---|---|"]
    for method, names in ITERATIONS.items():
        c, more = (count_iteration(method, k) for k in _COUNTS)
        shown = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {method} | {shown} | {c.launches} | {in_k(c.passes, more.passes)} |")
    lines += ["", "| a whole solve | launches | matrix read | written |", "|---|---|---|---|"]
    for op in SOLVES:
        c = count(op)
        lines.append(f"| `{op}` | {c.launches} | {c.reads:g} | {c.writes:g} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Return the page with the table of today between the marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    if not kernels.INTERPRETED:
        raise SystemExit("this counts in Triton's interpreter: run it with TRITON_INTERPRET=1")
    PAGE.write_text(with_table(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
