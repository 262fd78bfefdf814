"""Any size: nothing compiled anew, grids within their limits, no address of 32 bits."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is a dependency on Linux only")
tl = triton.language

from tests.kernels.offline import kernel_called, launches_written_down  # noqa: E402
from tests.kernels.problems import DTYPES  # noqa: E402
from tools import kernels_check as check  # noqa: E402
from tools.addresses import narrow_addresses  # noqa: E402
from tools.op_arguments import arguments  # noqa: E402
from tritonimplicit_kernels import ops  # noqa: E402
from tritonimplicit_kernels import triton as kernels  # noqa: E402
from tritonimplicit_kernels.layout import PRODUCT, SHAPES, shape_of  # noqa: E402
from tritonimplicit_kernels.leaves import RECORD  # noqa: E402
from tritonimplicit_kernels.triton import launch as launching  # noqa: E402

compiles = pytest.mark.skipif(
    kernels.INTERPRETED, reason="compiles, which the interpreter's process can't"
)
DENSE = {"dense_cg"}
"""Ops on (B, n, n): one program a system."""
HISTORIES = {"anderson_dots", "anderson_mix", "arnoldi_project", "arnoldi_step", "multi_dot"}
"""Ops on (K, B, ld): their addresses are checked as compiled alone."""
BILLION = 10**9
# (B, ld, P): one and few, odd and even, powers of two, beyond 2^31 elements in a row and in all.
SIZES = [
    (1, 16, 1),
    (1, 32, 1),
    (2, 48, 1),
    (3, 4096, 2),
    (16, 4112, 3),
    (1024, 65536, 16),
    (1_000_000, 16, 1),
    (1_000_000, 4096, 256),
    (1, 2 * BILLION, 256),
    (1, 4 * BILLION, 256),
    (5, 32 * BILLION, 255),
    (2**31 - 1, 16, 1),
]


def somewhere(op: str, dtype: torch.dtype, batch: int, ld: int, partials: int) -> list[Any]:
    """Arguments of any size that take no memory."""
    with torch.device("meta"):
        return list(arguments(op, dtype, batch, ld, partials).values())


def products_of(op: str) -> set[str]:
    """The arguments of an op that may be leaves."""
    schema = getattr(torch.ops.tritonimplicit, op).default._schema
    return PRODUCT & {argument.name for argument in schema.arguments}


@compiles
@pytest.mark.parametrize("op", ops.SCHEMAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_size_is_compiled_anew(op: str, dtype: torch.dtype) -> None:
    with launches_written_down(keep=False) as launches:
        for batch, ld, partials in SIZES:
            getattr(kernels, op)(*somewhere(op, dtype, batch, ld, partials))
            chunks = {"dense_cg": 1, "anderson_mix": kernels.partial_count(ld)}.get(op, partials)
            assert launches.take()[:3] == (batch * chunks, 1, 1)
    assert launches.by_triton == len(SIZES)
    assert launches.compiled == [f"_{op}_kernel"]


@compiles
@pytest.mark.parametrize("op", [op for op in ops.SCHEMAS if products_of(op)])
def test_no_leaves_are_compiled_anew(op: str) -> None:
    with launches_written_down(keep=False) as launches:
        for count, (batch, ld, partials) in enumerate(SIZES, start=1):
            with torch.device("meta"):
                values = arguments(op, torch.float32, batch, ld, partials)
                table = torch.zeros(1 + RECORD * count, dtype=torch.int64)
            getattr(kernels, op)(*(values | dict.fromkeys(products_of(op), table)).values())
    assert launches.by_triton == len(SIZES)
    assert launches.compiled == [f"_{op}_kernel"]


@compiles
@pytest.mark.parametrize("op", sorted(ops.SCHEMAS.keys() - DENSE))
def test_more_programs_than_a_grid_has_are_refused(op: str) -> None:
    # anderson_mix has no partial sums, and cuts long rows by itself.
    batch, ld = (2**23, 256 * 2048) if op == "anderson_mix" else (2**23, 16)
    with launches_written_down() as launches:
        with pytest.raises(ValueError, match=r"8388608 systems with 256 .* at most 2147483647"):
            getattr(kernels, op)(*somewhere(op, torch.float32, batch, ld, 256))
        assert not launches.made


@compiles
@pytest.mark.parametrize("name", [] if kernels.INTERPRETED else sorted(check.kernel_names()))
def test_no_kernel_specialises_an_integer(name: str) -> None:
    parameters = kernel_called(name).params
    for each in parameters:
        pointer = each.name.endswith("_ptr")
        assert pointer or each.is_constexpr or each.do_not_specialize, each.name
    constexprs = [each.is_constexpr for each in parameters]
    assert constexprs == sorted(constexprs), "constexprs come last"


# --- Addresses, as compiled -----------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def _wide_kernel(x_ptr, n, BLOCK: tl.constexpr):
    """Products and sums in 64 bits; the stored number may be a sum in 32."""
    start = tl.program_id(0).to(tl.int64) * n
    for s in range(start, start + n, BLOCK):
        offsets = s + tl.arange(0, BLOCK)
        tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1, mask=offsets < start + n)


@triton.jit(do_not_specialize=["n"])
def _product_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offsets = (tl.program_id(0) * n).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1)


@triton.jit(do_not_specialize=["n"])
def _carried_kernel(x_ptr, n, BLOCK: tl.constexpr):
    """The sum that wraps around is the next round's."""
    offsets = tl.arange(0, BLOCK)
    for _ in range(n):
        tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1)
        offsets += BLOCK


@triton.jit(do_not_specialize=["n"])
def _branch_kernel(x_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0)
    start = start * n if n > 0 else start + 1
    tl.store(x_ptr + start, 1)


@triton.jit(do_not_specialize=["n"])
def _mask_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, 1, mask=offsets < n * BLOCK)


def narrow(kernel: Any) -> list[str]:
    with check.compiling_only(check.TARGETS[1]) as compiled:
        kernel[(1,)](torch.zeros(16, dtype=torch.int32), 100, BLOCK=64, enable_fp_fusion=False)
    (binary,) = compiled.values()
    return narrow_addresses(binary.asm["ttir"])


@compiles
def test_wide_addresses_pass() -> None:
    assert narrow(_wide_kernel) == []


@compiles
@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (_product_kernel, ["muli"]),
        (_carried_kernel, ["addi"]),
        (_branch_kernel, ["muli", "addi"]),
        (_mask_kernel, ["muli"]),
    ],
)
def test_narrow_addresses_are_found(kernel: Any, found: list[str]) -> None:
    texts = narrow(kernel)
    assert len(texts) == len(found)
    assert all(f"arith.{each} " in text for each, text in zip(found, texts, strict=True)), texts


@compiles
@pytest.mark.parametrize("target", check.TARGETS[1::3], ids=["cuda", "hip"])
def test_our_addresses_are_wide(target: Any) -> None:
    with check.compiling_only(target) as compiled:
        check.launch_all(torch.float32, None)
    assert compiled.keys() == check.kernel_names()
    for name in compiled.keys() - check.RESIDENT:
        binary = compiled[name]
        assert narrow_addresses(binary.asm["ttir"]) == [], name


# --- Addresses, as run ----------------------------------------------------------------------------

# Beyond 2^31 in systems, in a row, in both: (B, ld, P), and the last chunk of a row that has any
# elements. That is a whole block and 16 elements more, or just these.
BLOCK = 2**17
FAR = {
    "systems": (2**27 + 3, 16, 1, 0),
    "a row": (1, 16446 * BLOCK + 16, 256, 253),
    "dense systems": (2**17 + 3, 128, 1, 0),
    "rows": (3, 8218 * BLOCK + 16, 256, 249),
}


def sparse(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros in address space alone: the machine gives memory to those pages that are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE on Linux
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype)


@contextmanager
def running_only(program: int) -> Iterator[None]:
    """In the interpreter, run this one of a grid's programs, on tensors where they are."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_idx, call = builder.set_grid_dim, builder.set_grid_idx, GridExecutor.__call__

    def call_once(self: Any, *args: Any, **options: Any) -> None:
        grid, self.grid = self.grid, (1, 1, 1)
        with (
            mock.patch.object(builder, "set_grid_dim", lambda *_: set_dim(*grid, 1, 1)),
            mock.patch.object(builder, "set_grid_idx", lambda *_: set_idx(program, 0, 0)),
        ):
            call(self, *args, **options)

    with (
        mock.patch.object(GridExecutor, "__call__", call_once),
        mock.patch.object(GridExecutor, "_init_args_hst", lambda self, *args: args),
        mock.patch.object(GridExecutor, "_restore_args_dev", lambda self, *args: None),
    ):
        yield


def last(tensor: Tensor, name: str, size: int) -> Tensor:
    """The last system's part; of vectors its last `size` elements."""
    for axis, kind in enumerate(SHAPES[name].split(", ")):
        if kind == "B":
            tensor = tensor.narrow(axis, tensor.shape[axis] - 1, 1)
        elif kind == "ld":
            tensor = tensor.narrow(axis, tensor.shape[axis] - size, size)
    return tensor


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("op", "where"),
    [
        (op, where)
        for op in sorted(ops.SCHEMAS.keys() - HISTORIES)
        for where in FAR
        if (op in DENSE) == ("dense" in where)
    ],
)
def test_an_op_does_beyond_2_to_the_31_what_it_does_at_the_start(
    op: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_BLOCK_BYTES", 4 * BLOCK)
    batch, ld, partials, chunk = FAR[where]
    sizes = {"B": batch, "ld": ld, "P": partials, "n": ld}
    assert batch * ld * (ld if op in DENSE else 1) > 2**31
    size = min(ld, BLOCK + 16)
    near = {
        name: value.uniform_(1, 2) if SHAPES.get(name) == "B, ld" else value
        for name, value in arguments(op, torch.float32, batch=1, ld=size, partials=1).items()
    }
    far: dict[str, Any] = {}
    for name, value in near.items():
        if isinstance(value, int):
            far[name] = value
            continue
        shape = torch.Size(shape_of(name, sizes))
        far[name] = sparse(shape.numel(), value.dtype).view(shape)
        end = last(far[name], name, size)
        (end[..., :1] if "P" in SHAPES[name] else end).copy_(value)  # the other sums are zero
    getattr(kernels, op)(*near.values())
    with running_only((batch - 1) * partials + chunk):
        getattr(kernels, op)(*far.values())
    for argument in getattr(torch.ops.tritonimplicit, op).default._schema.arguments:
        name = argument.name
        if argument.alias_info is None or (SHAPES[name] in ("B", "2, B") and partials > 1):
            continue  # an input, or what a row's first program alone writes
        end = last(far[name], name, size)
        end = end[..., chunk : chunk + 1] if "P" in SHAPES[name] else end
        assert torch.equal(end, near[name]), name
