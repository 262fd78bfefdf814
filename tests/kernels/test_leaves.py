"""Products read from leaves where they lie: the bits of a step on rows, whatever the leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.bicgstab_problems import RESULTS as BICGSTAB_RESULTS
from tests.kernels.bicgstab_problems import BiCGSTAB, bicgstab, oracle, pbicgstab
from tests.kernels.problems import (
    CG,
    DTYPES,
    F64,
    Neumann,
    Step,
    Target,
    cg,
    cg_oracle,
    neumann,
    neumann_oracle,
    pcg,
)
from tritonimplicit_kernels import Backend, LeafTables, backend, partial_count, readable

triton = pytest.importorskip("triton", reason="triton is a dependency on Linux only")

from tests.kernels.test_steps import same  # noqa: E402
from tests.kernels.test_triton import results, shuffled_programs  # noqa: E402

HALF = [torch.float16, torch.bfloat16]
MAKERS = [cg, pcg, neumann, bicgstab, pbicgstab]
Place = Callable[[Tensor], Tensor]
PRODUCTS = ("ap", "ax", "v", "t")


@dataclass
class Form:
    """What a leaf looks like in memory: (B, size) elements of `dtype`, read with these strides."""

    size: int
    dtype: torch.dtype = torch.float32
    offset: int = 0  # elements, from an aligned address
    gap: int = 0  # elements between one system's and the next's
    expanded: bool = False  # one system's, for all

    def make(self, values: Tensor) -> Tensor:
        """Return a leaf with these values (B, size), rounded; what lies around it is NaN."""
        batch = 1 if self.expanded else values.shape[0]
        width = self.size + self.gap
        memory = torch.full((self.offset + batch * width + 16,), torch.nan, dtype=self.dtype)
        memory = memory.to(values.device)
        leaf = memory[self.offset :][: batch * width].view(batch, width)[:, : self.size]
        leaf.copy_(values[:batch])
        return leaf.expand(values.shape[0], self.size)


def rows_of(leaves: list[Tensor], starts: list[int], ld: int, dtype: torch.dtype) -> Tensor:
    rows = leaves[0].new_zeros(leaves[0].shape[0], ld, dtype=dtype)
    for leaf, start in zip(leaves, starts, strict=True):
        rows[:, start : start + leaf.shape[1]] = leaf
    return rows


def places(forms: list[Form]) -> tuple[list[int], int]:
    """Where the leaves start in a row, and ld."""
    starts, ld = [], 0
    for form in forms:
        starts.append(ld)
        ld += -(-form.size // 16) * 16
    return starts, ld


def launch(step: Step, backend: Backend, place: Place) -> None:
    """Do one step, each of whose products (B, ld) is what `place` makes of it."""
    if not isinstance(step, BiCGSTAB):
        name = "ap" if isinstance(step, CG) else "ax"
        setattr(step, name, place(getattr(step, name)))
        return step.launch(backend)
    step.v = place(step.v)
    step.launch_dots(backend)
    step.launch_half_step(backend)
    step.multiply()
    step.t = place(step.t)
    step.launch_half_dots(backend)
    return step.launch_step(backend)


def assert_same_bits(one: Step, other: Step) -> None:
    for name in BICGSTAB_RESULTS if isinstance(one, BiCGSTAB) else results(one):
        assert same(getattr(one, name), getattr(other, name)), name


def both_ways(
    target: Target, make: type, batch: int, forms: list[Form], dtype: torch.dtype, count: int
) -> tuple[Step, Step, Step]:
    """Return a step, what it comes to with its products in rows, and the same read from leaves."""
    starts, ld = places(forms)
    step: Step = make(batch, ld, dtype, count)
    if batch > 1 and not isinstance(step, Neumann):
        step.state[0, -1], step.residual_sq[-1] = 3, 7.0  # frozen, beside those that run
    tables = LeafTables(starts, [form.size for form in forms], ld, dtype, target.device)
    made = []  # tables hold addresses alone

    def leaves_of(values: Tensor) -> list[Tensor]:
        pairs = zip(forms, starts, strict=True)
        made.append([form.make(values[:, start : start + form.size]) for form, start in pairs])
        assert all(map(readable, made[-1]))
        return made[-1]

    def rows(values: Tensor) -> Tensor:
        return rows_of(leaves_of(values), starts, ld, dtype)

    expected, done = step.to(target.device), step.to(target.device)
    launch(expected, target.backend, rows)
    launch(done, target.backend, lambda values: tables.table(leaves_of(values)))
    return step, expected.to("cpu"), done.to("cpu")


# In float32 a block is 2048 elements: a whole one, one with four leaves' pieces, a masked tail.
FORMS = [Form(4096), Form(5), Form(33), Form(1), Form(2000), Form(40)]
STRANGE = {
    "plain": FORMS,
    "one leaf": [Form(4096 + 16)],
    "one odd leaf": [Form(4099)],
    "scalar": [Form(1)],
    "unaligned": [Form(4096, offset=1), Form(4096, offset=3), Form(7, offset=5)],
    "apart": [Form(4096, gap=4), Form(2048, gap=1), Form(9, gap=7)],
    "expanded": [Form(4096, expanded=True), Form(3, expanded=True), Form(2048, gap=3)],
    "half": [Form(4096, torch.float16), Form(2048, torch.bfloat16), Form(9, torch.float16)],
    "mixed": [
        Form(2048, torch.bfloat16, offset=1),
        Form(2048, torch.float32, gap=1),
        Form(17, torch.float16, offset=3, gap=5),
        Form(2048, torch.float16),
        Form(30, torch.bfloat16, expanded=True),
    ],
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", STRANGE)
def test_a_step_on_leaves_has_the_bits_of_a_step_on_rows(
    triton_target: Target, make: type, name: str
) -> None:
    _, expected, done = both_ways(triton_target, make, 2, STRANGE[name], torch.float32, 2)
    assert_same_bits(done, expected)


@pytest.mark.parametrize("make", MAKERS)
def test_float64_steps_read_leaves_of_every_dtype(triton_target: Target, make: type) -> None:
    forms = [Form(n, dtype) for dtype in (F64, torch.float32, *HALF) for n in (1024, 40)]
    _, expected, done = both_ways(triton_target, make, 2, forms, F64, 2)
    assert_same_bits(done, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", MAKERS)
def test_a_step_on_leaves_is_the_oracles(
    triton_target: Target, make: type, dtype: torch.dtype
) -> None:
    forms = [Form(1024, torch.bfloat16), Form(48, torch.float16, offset=1), Form(160)]
    step, rows, done = both_ways(triton_target, make, 2, forms, dtype, 1)
    for name in PRODUCTS:
        if hasattr(step, name):
            setattr(step, name, getattr(rows, name))
    if isinstance(step, BiCGSTAB):
        expected = oracle(step, step.t)
    else:
        expected = cg_oracle(step) if isinstance(step, CG) else neumann_oracle(step)
    for name, close in expected.items():
        actual = getattr(done, name)
        runs = slice(0, 2 if isinstance(step, Neumann) else 1)  # the others' last one is frozen
        close.value, close.bound = close.value[runs], close.bound[runs]
        close.check((actual.sum(1) if name in ("rr_out", "rz_out") else actual)[runs])


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, list[Form]]:
    forms = st.builds(
        Form,
        size=st.sampled_from([1, 2, 15, 16, 17, 100, 2047, 2048, 2049, 4200]),
        dtype=st.sampled_from([torch.float32, *HALF]),
        offset=st.integers(0, 9),
        gap=st.sampled_from([0, 1, 3, 4, 8, 16]),
        expanded=st.booleans(),
    )
    return draw(st.integers(1, 3)), draw(st.lists(forms, min_size=1, max_size=6))


@pytest.mark.interpreter
@settings(deadline=None, max_examples=40)  # the interpreter takes milliseconds a program
@given(tree=trees(), make=st.sampled_from(MAKERS), count=st.integers(1, 3))
def test_any_leaves_are_read_as_rows_are(
    tree: tuple[int, list[Form]], make: type, count: int
) -> None:
    target = Target(backend("triton", "cpu", torch.float32), "cpu")
    batch, forms = tree
    _, expected, done = both_ways(target, make, batch, forms, torch.float32, count)
    assert_same_bits(done, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("make", MAKERS)
def test_the_order_of_programs_does_not_matter(make: type) -> None:
    target = Target(backend("triton", "cpu", torch.float32), "cpu")
    with shuffled_programs(0):
        _, _, shuffled = both_ways(target, make, 2, FORMS, torch.float32, 3)
    _, _, done = both_ways(target, make, 2, FORMS, torch.float32, 3)
    assert_same_bits(shuffled, done)


def test_what_can_be_read_where_it_lies() -> None:
    leaf = torch.zeros(3, 8)
    assert readable(leaf) and readable(leaf[:, 1:4]) and readable(leaf[:1].expand(3, 8))
    assert readable(torch.zeros(3, 1).expand(3, 1)) and readable(torch.zeros(1, 3).T)
    assert not readable(torch.zeros(8, 3).T) and not readable(torch.zeros(3, 1).expand(3, 8))
    negative = torch.ones(3, 8, dtype=torch.complex64).conj().imag
    assert negative.is_neg() and not readable(negative)


@pytest.mark.parametrize("wrong", [F64, torch.int32])
def test_a_leaf_that_the_vectors_cannot_hold_is_refused(wrong: torch.dtype) -> None:
    tables = LeafTables([0], [5], 16, torch.float32, "cpu")
    with pytest.raises(TypeError, match=f"torch.bfloat16, not {wrong}: convert it"):
        tables.table([torch.zeros(2, 5, dtype=wrong)])


def test_a_graphs_tables_lie_in_memory_made_before_its_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaves = [torch.zeros(2, 5), torch.zeros(2, 3)]
    tables = LeafTables([0, 16], [5, 3], 32, torch.float32, "cpu")
    products = [[leaf + k for leaf in leaves] for k in range(3)]
    for _ in range(2):  # one graph, and another
        tables.reserve(3)
        room = tables._reserve.fill_(7)
        with monkeypatch.context() as capture:
            capture.setattr("tritonimplicit_kernels.leaves._captures", lambda device: True)
            made = [tables.table(product) for product in products]
            with pytest.raises(RuntimeError, match="more tables than the 3 reserved"):
                tables.table(leaves)
        for k, table in enumerate(made):
            assert table.data_ptr() == room[k].data_ptr() and table.data_ptr() % 16 == 0
            assert (table == 7).all()  # not written yet
        tables.write()
        for table, product in zip(made, products, strict=True):
            assert torch.equal(table, tables.table(product))
    with monkeypatch.context() as capture:
        capture.setattr("tritonimplicit_kernels.leaves._captures", lambda device: True)
        with pytest.raises(RuntimeError, match="more tables than the 0 reserved"):
            tables.table(leaves)


@pytest.mark.gpu
def test_a_graphs_table_is_written_once_after_its_capture() -> None:
    leaves = [torch.zeros(1, 4096, device="cuda"), torch.zeros(1, 5, device="cuda")]
    target = Target(backend("triton", "cuda", torch.float32), "cuda")
    ld = 4096 + 16
    step = cg(1, ld, torch.float32, partial_count(ld, "cuda")).to("cuda")
    step.launch(target.backend)  # compiles
    tables = LeafTables([0, 4096], [4096, 5], ld, torch.float32, "cuda")
    target.backend.cg_dots(step.p, tables.table(leaves), step.state, step.dots)
    tables.reserve(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Each replay writes them, in memory that the capture gives away to what is of their size.
        temporaries = [torch.ones(9, dtype=torch.int64, device="cuda") for _ in range(4)]
        del temporaries
        made = [leaf + 2 for leaf in leaves]
        target.backend.cg_dots(step.p, tables.table(made), step.state, step.dots)
    tables.write()
    for value in (0.0, 1.0):
        for leaf in leaves:
            leaf.fill_(value)
        graph.replay()
        elements = step.p[:, : 4096 + 5].double().cpu()
        bound = math.sqrt(ld) * torch.finfo(F64).eps * (value + 2) * elements.abs().sum()
        assert abs(step.dots[0].sum().item() - (value + 2) * elements.sum().item()) <= bound
