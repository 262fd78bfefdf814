"""Compile every kernel for GPUs that need not be there, and judge the machine code.

Prints a table, and fails on a spilled register, on a main loop's load that is not 128 bits wide,
on an address computed in 32 bits, and where registers or spills are not those of
kernels_budget.json, which `--update` writes.

Of products with A, leaves are read in the main loop element by element too, where a block is not
all of one leaf: as many loads as on rows have to be wide, and spills are the budget's affair.
Loads of bfloat16 rows may be narrower, as long as those of the other vectors are not.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tools.addresses import narrow_addresses
from tools.op_arguments import arguments
from tritonimplicit_kernels import ops
from tritonimplicit_kernels import triton as kernels
from tritonimplicit_kernels.layout import PRODUCT

TARGETS = [
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("cuda", 120, 32),
    GPUTarget("hip", "gfx942", 64),
    GPUTarget("hip", "gfx1100", 32),
]
DTYPES = [torch.float32, torch.float64]
RESIDENT = {"_dense_cg_kernel"}
"""Whole solves: what they read stays in registers, and their loops load nothing."""
PRODUCTS = {"": None, " leaves": torch.int64, " bfloat16": torch.bfloat16}
"""What a product may be beside rows of the vectors' dtype: a table of leaves, rows of bfloat16."""
BUDGET = Path(__file__).with_name("kernels_budget.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SINGLE_VECTORS = {
    "_multi_dot_kernel": 1,
    "_arnoldi_project_kernel": 1,
    "_arnoldi_step_kernel": 1,
    "_anderson_dots_kernel": 4,
    "_anderson_mix_kernel": 2,
}
"""Loads, an iteration of the main loop, of one vector beside many: a block of one is too short for
128 bits a thread, a tile of many is four such loads a thread."""


Usage: TypeAlias = dict[str, dict[str, str]]
"""What a kernel of a dtype uses on a target: usage[target][kernel and dtype]."""


@dataclass
class Report:
    """What the machine code of one kernel says."""

    registers: int
    spills: int
    bulk_widths: list[str]
    shared: int

    @property
    def wide(self) -> int:
        """The number of bulk loads that are 128 bits wide."""
        return sum(width in ("128", "dwordx4", "b128") for width in self.bulk_widths)

    @property
    def usage(self) -> str:
        return f"{self.registers} registers, {self.spills} spills"

    def faults(
        self,
        product: torch.dtype | None = None,
        wide: int = 0,
        singles: int = 0,
        resident: bool = False,
    ) -> list[str]:
        """Say what is wrong; `wide` loads are those of the same kernel on rows, for a product.

        `singles` loads beside each four may be narrow.
        """
        found = []
        if product is not None and self.wide < (wide if product is torch.int64 else wide // 2):
            found.append(f"has {self.wide} wide main-loop loads, where on rows it has {wide}")
        if product is torch.int64:
            return found
        if self.spills:
            found.append(f"spills ({self.spills})")
        if resident:
            return [*found, "loads in a loop"] if self.bulk_widths else found
        if not self.bulk_widths:
            found.append("has no main loop with loads")
        elif product is None and 4 * (len(self.bulk_widths) - self.wide) > singles * self.wide:
            found.append(f"has main-loop loads of widths {sorted(set(self.bulk_widths))}")
        return found


class OfflineDriver:
    """Stands for a GPU that is not there: enough for Triton to compile, not to run."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> tuple[str, str | int]:
        return self._target.backend, self._target.arch  # keys Triton's cache of compiled kernels

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiling_only(target: GPUTarget) -> Iterator[dict[str, Any]]:
    """Make launches compile for `target` and run nothing; yield the compiled kernels by name.

    The arguments are specialised as at run time, and blocks and warps are the launchers' own.
    """
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, warmup: bool, **options: Any) -> None:
        compiled[self.__name__] = run(self, *args, warmup=True, **options)

    offline = mock.patch.object(driver, "_active", OfflineDriver(target))
    with offline, mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def launch_all(dtype: torch.dtype, product: torch.dtype | None) -> None:
    """Call the Triton launcher of every op on small tensors; of those with a product, if given."""
    for op in ops.SCHEMAS:
        values = arguments(op, dtype, batch=2, ld=4096, partials=2)
        if product is not None:
            changed = {
                name: torch.zeros(2, 4096, dtype=product) for name in PRODUCT & values.keys()
            }
            if not changed:
                continue
            values |= changed
        getattr(kernels, op)(*values.values())


def kernel_names() -> set[str]:
    """Return the names of all kernels in the package."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")
    ]
    names = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert names, "the package has no kernels"
    return names


def innermost_loops(
    lines: list[str], branch: Callable[[int, str], int | None], loads: re.Pattern[str]
) -> Iterable[list[str]]:
    """Yield the widths of the loads of each innermost loop that loads.

    A loop lies between a branch backwards and its target; `branch` returns a line's target.
    """
    loops = []
    for end, line in enumerate(lines):
        start = branch(end, line)
        if start is not None and start < end:
            widths = [found[1] for text in lines[start:end] if (found := loads.search(text))]
            if widths:
                loops.append((start, end, widths))
    for start, end, widths in loops:
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e, _ in loops):
            yield widths


def report_cuda(kernel: Any) -> Report:
    """Read registers, local memory and loads from the SASS."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [CUOBJDUMP, option, cubin], check=True, capture_output=True, text=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    code = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    index = {int(address, 16): k for k, (address, _) in enumerate(code)}
    lines = [text for _, text in code]

    def branch(_: int, line: str) -> int | None:
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line)
        return index[int(target[1], 16)] if target else None

    loops = innermost_loops(lines, branch, re.compile(r"\bLDG\.E\S*?(?:\.(64|128|U8|U16|S8))?\s"))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers and lines, "cuobjdump's output is not as expected"
    return Report(
        registers=int(registers[1]),
        spills=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines),
        bulk_widths=[width or "32" for widths in loops for width in widths],
        shared=kernel.metadata.shared,
    )


def report_hip(kernel: Any) -> Report:
    """Read registers, spills and loads from the AMDGCN assembly."""
    assembly = kernel.asm["amdgcn"]
    lines = assembly.splitlines()
    labels = {line.split(":")[0]: k for k, line in enumerate(lines) if line.startswith(".LBB")}

    def branch(_: int, line: str) -> int | None:
        target = re.search(r"\bs_c?branch\w*\s+(\.LBB\w+)", line)
        return labels[target[1]] if target else None

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        assert found, f"the assembly does not say .{key}"
        return int(found[1])

    loops = innermost_loops(lines, branch, re.compile(r"\b(?:global|buffer|flat)_load_(\w+)"))
    return Report(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        bulk_widths=[width for widths in loops for width in widths],
        shared=kernel.metadata.shared,
    )


def report(target: GPUTarget, kernel: Any) -> Report:
    return report_cuda(kernel) if target.backend == "cuda" else report_hip(kernel)


def over_budget(used: Usage, budget: Usage) -> list[str]:
    """Say where what the kernels use is not what the budget has, either way."""
    version = budget["triton"]["version"]
    if version != triton.__version__:
        return [f"{BUDGET.name} is of triton {version}, this is {triton.__version__}"]
    found = []
    for target in sorted({*used, *budget} - {"triton"}):
        now, before = used.get(target, {}), budget.get(target, {})
        found += [
            f"{kernel} for {target} has {now.get(kernel, 'gone')}; "
            f"{BUDGET.name} says {before.get(kernel, 'nothing')}"
            for kernel in sorted({*now, *before})
            if now.get(kernel) != before.get(kernel)
        ]
    return found


def compile_all() -> tuple[Usage, list[str]]:
    """Compile and print everything; return what the kernels use, and what is wrong with them."""
    used: Usage = {}
    faults = []
    print(f"{'kernel':28}{'dtype':18}{'target':9}{'registers':>9}{'spills':>8}", end="")
    print(f"{'128-bit bulk loads':>20}{'shared bytes':>14}")
    for target in TARGETS:
        name = target.arch if target.backend == "hip" else f"sm_{target.arch}"
        used[name] = {}
        wide: dict[str, int] = {}
        for (form, product), dtype in itertools.product(PRODUCTS.items(), DTYPES):
            with compiling_only(target) as compiled:
                launch_all(dtype, product)
            missing = kernel_names() - compiled.keys() if product is None else ()
            faults += [f"{kernel} for {name}: no op launches it" for kernel in sorted(missing)]
            reports = {kernel: report(target, binary) for kernel, binary in compiled.items()}
            if product is None:  # the least of both dtypes': some loops are unrolled
                wide = {
                    kernel: min(r.wide, wide.get(kernel, r.wide)) for kernel, r in reports.items()
                }
            for kernel, r in reports.items():
                kind = f"{str(dtype)[6:]}{form}"
                used[name][f"{kernel.strip('_')} {kind}"] = r.usage
                share = f"{r.wide} of {len(r.bulk_widths)}"
                row = f"{kernel.strip('_'):28}{kind:18}{name:9}{r.registers:>9}"
                print(f"{row}{r.spills:>8}{share:>20}{r.shared:>14}")
                singles = SINGLE_VECTORS.get(kernel, 0)
                found = r.faults(product, wide[kernel], singles, kernel in RESIDENT)
                if kernel not in RESIDENT:  # within a small matrix 32 bits do
                    found += narrow_addresses(compiled[kernel].asm["ttir"])
                faults += [f"{kernel} in {kind} for {name} {fault}" for fault in found]
    return used, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"write {BUDGET.name} anew")
    update = parser.parse_args().update
    if kernels.INTERPRETED:
        raise SystemExit("this compiles kernels: run it without TRITON_INTERPRET=1")
    used, faults = compile_all()
    if update:
        budget = {"triton": {"version": triton.__version__}} | used
        BUDGET.write_text(json.dumps(budget, indent=2) + "\n")
    elif over := over_budget(used, json.loads(BUDGET.read_text())):
        faults += [*over, "if that is meant: .venv/bin/python -m tools.kernels_check --update"]
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
