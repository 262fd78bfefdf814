"""The check of the compiled kernels can fail: on masked loads, on spills, on a missing loop."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a dependency on Linux only")
tl = triton.language

from tools import kernels_check as check  # noqa: E402
from tritonimplicit_kernels.triton import INTERPRETED  # noqa: E402

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="compiles, which the interpreter's process can't"
)
# One of each assembly; the tool itself goes through all. With these options few registers are left.
CUDA, CDNA, RDNA = check.TARGETS[1], check.TARGETS[4], check.TARGETS[5]
FEW_REGISTERS = {CUDA: {"maxnreg": 24}, CDNA: {"waves_per_eu": 8}, RDNA: {"waves_per_eu": 16}}
TARGETS = pytest.mark.parametrize("target", [CUDA, CDNA, RDNA], ids=["cuda", "cdna", "rdna"])


@triton.jit(do_not_specialize=["n"])
def _masked_kernel(x_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    """Masks by a length of unknown divisibility, so that loads cannot be wide."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(sum_ptr, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["n16"])
def _wide_kernel(x_ptr, sum_ptr, n16, BLOCK: tl.constexpr):
    """Loads whole blocks."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n16 * 16, BLOCK):
        total += tl.load(x_ptr + start + tl.arange(0, BLOCK))
    tl.store(sum_ptr, tl.sum(total, axis=0))


@triton.jit
def _loopless_kernel(x_ptr, sum_ptr, n16, BLOCK: tl.constexpr):
    tl.store(sum_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


def faults(target: Any, kernel: Any, resident: bool = False, **options: int) -> str:
    with check.compiling_only(target) as compiled:
        kernel[(1,)](torch.zeros(16), torch.zeros(1), 100, enable_fp_fusion=False, **options)
    (binary,) = compiled.values()
    return "; ".join(check.report(target, binary).faults(resident=resident))


@TARGETS
def test_a_good_kernel_passes(target: Any) -> None:
    assert faults(target, _wide_kernel, BLOCK=2048, num_warps=8) == ""


@TARGETS
def test_narrow_loads_are_found(target: Any) -> None:
    assert "main-loop loads of widths" in faults(target, _masked_kernel, BLOCK=2048, num_warps=8)


@TARGETS
def test_spills_are_found(target: Any) -> None:
    options = FEW_REGISTERS[target]
    assert "spills" in faults(target, _wide_kernel, BLOCK=4096, num_warps=1, **options)


@TARGETS
def test_a_kernel_without_a_loop_is_found(target: Any) -> None:
    assert "no main loop" in faults(target, _loopless_kernel, BLOCK=2048, num_warps=8)


@TARGETS
def test_a_whole_solve_that_loads_in_a_loop_is_found(target: Any) -> None:
    assert faults(target, _wide_kernel, True, BLOCK=2048, num_warps=8) == "loads in a loop"
    assert faults(target, _loopless_kernel, True, BLOCK=2048, num_warps=8) == ""


def test_on_leaves_as_many_loads_are_wide_as_on_rows() -> None:
    report = check.Report(registers=64, spills=2, bulk_widths=["128", "32", "64"], shared=0)
    assert report.faults(torch.int64, wide=1) == []  # of spills, the budget says how many
    (found,) = report.faults(torch.int64, wide=2)
    assert "has 1 wide main-loop loads, where on rows it has 2" in found


def test_a_half_product_costs_the_other_vectors_no_wide_load() -> None:
    report = check.Report(registers=64, spills=0, bulk_widths=["128", "64"], shared=0)
    assert report.faults(torch.bfloat16, wide=2) == []
    assert "wide" in "".join(report.faults(torch.bfloat16, wide=4))
    report.spills = 2
    assert report.faults(torch.bfloat16, wide=2) == ["spills (2)"]


def test_all_kernels_are_known() -> None:
    assert check.kernel_names() == {f"_{op}_kernel" for op in check.ops.SCHEMAS}


@pytest.mark.parametrize("op", check.ops.SCHEMAS)
def test_no_size_compiles_anew(op: str) -> None:
    found = []
    for batch, ld, partials, count in [(2, 4096, 2, 8), (5, 64, 1, 11), (1, 16, 1, 14)]:
        values = check.arguments(op, torch.float32, batch, ld, partials, count)
        with check.compiling_only(CUDA) as compiled:
            getattr(check.kernels, op)(*values.values())
        found += compiled.values()
    assert len(found) == 3 and found[0] is found[1] is found[2]


def test_a_narrow_load_beside_a_tile_is_allowed_where_it_is_said() -> None:
    beside = check.Report(registers=1, spills=0, bulk_widths=["128"] * 4 + ["32"], shared=0)
    assert beside.faults(singles=1) == [] and beside.faults() != []
    narrow = check.Report(registers=1, spills=0, bulk_widths=["128"] * 3 + ["32"] * 2, shared=0)
    assert narrow.faults(singles=1) != []


USED = {"sm_90": {"a_kernel float32": "64 registers, 0 spills"}}
BUDGET = {"triton": {"version": triton.__version__}, **USED}


def test_what_the_budget_says_passes() -> None:
    assert check.over_budget(USED, BUDGET) == []


@pytest.mark.parametrize(
    ("used", "budget", "message"),
    [
        ({"a_kernel float32": "66 registers, 0 spills"}, {}, "has 66 registers, 0 spills; .* 64"),
        ({"a_kernel float32": "62 registers, 0 spills"}, {}, "has 62 registers, 0 spills; .* 64"),
        ({"b_kernel float32": "8 registers, 0 spills"}, {}, "b_kernel .* says nothing"),
        ({}, {"gone_kernel float32": "8 registers, 0 spills"}, "gone_kernel .* has gone"),
    ],
)
def test_what_the_budget_does_not_say_is_found(used: Any, budget: Any, message: str) -> None:
    now = {"sm_90": USED["sm_90"] | used}
    allowed = {**BUDGET, "sm_90": USED["sm_90"] | budget}
    (found,) = check.over_budget(now, allowed)
    assert re.search(message, found)


def test_a_target_without_a_budget_is_found() -> None:
    assert len(check.over_budget({**USED, "sm_80": USED["sm_90"]}, BUDGET)) == 1


def test_a_budget_of_another_triton_is_found() -> None:
    (found,) = check.over_budget(USED, {**BUDGET, "triton": {"version": "1.0"}})
    assert "of triton 1.0" in found


def test_the_budget_names_every_kernel_on_every_target() -> None:
    budget = json.loads(check.BUDGET.read_text())
    del budget["triton"]
    kernels = {
        f"{op}_kernel {dtype}{form}"
        for op, arguments in check.ops.SCHEMAS.items()
        for form in (check.PRODUCTS if re.search(r"\b(ap|ax|v|t)\b", arguments) else ("",))
        for dtype in ("float32", "float64")
    }
    assert len(budget) == len(check.TARGETS)
    assert all(set(of_target) == kernels for of_target in budget.values())
