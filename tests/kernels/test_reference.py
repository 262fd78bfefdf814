"""The plain torch backend: a system's bits depend on nothing beside it, and norms stay in range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.problems import DTYPES, F64, Step, Target, cg, cg_oracle, neumann, pcg, randn
from tritonimplicit_kernels import (
    backend,
    partial_count,
    reference,
    row_dots,
    row_norms,
    row_weighted_squares,
    status,
)
from tritonimplicit_kernels.reference import dots
from tritonimplicit_kernels.reference.dots import LONG
from tritonimplicit_kernels.reference.tiles import TILE

TARGET = Target(reference, "cpu")
# Short rows and long ones, one or several a tile, longer than a tile; tails of every kind.
LENGTHS = [16, 48, 1008, 16384, 16400, 40000, 70000]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits_equal(one: Step, other: Step) -> bool:
    results = ("x", "r", "p", "dots", "rr_out", "rz_out", "state_out", "residual_sq")
    pairs = [(getattr(one, name), getattr(other, name)) for name in results if hasattr(one, name)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("make", [cg, pcg, neumann])
def test_a_system_is_the_same_alone_and_in_a_batch(
    make: type, n: int, dtype: torch.dtype, threads: int
) -> None:
    step: Step = make(7, n, dtype, 3)  # three partial sums: fewer than a SIMD register holds
    together = TARGET.run(step)
    for systems in ([0], [3, 5], [1, 2, 3, 4, 5, 6]):
        assert bits_equal(TARGET.run(step.select(systems)), together.select(systems))
    step.state[0, [0, 3, 4]] = status.CONVERGED  # frozen beside those that run: they are NaN
    step.residual_sq[:] = 0
    step.x[[0, 3, 4]] = torch.nan
    running = [1, 2, 5, 6]
    assert bits_equal(TARGET.run(step).select(running), together.select(running))


@pytest.mark.parametrize(("systems", "n"), [(600, 2048), (40, 10_000), (1, LONG - 16)])
def test_threads_do_not_change_the_bits_of_rows_that_are_not_long(systems: int, n: int) -> None:
    before = torch.get_num_threads()
    done = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        done.append([TARGET.run(make(systems, n, torch.float32)) for make in (cg, pcg, neumann)])
    torch.set_num_threads(before)
    for other in done[1:]:
        assert all(bits_equal(a, b) for a, b in zip(done[0], other, strict=True))


class Allocations(TorchDispatchMode):
    """Records the bytes of each tensor that is not a view of a known one."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and (
                tensor.untyped_storage().data_ptr() not in self._known
            ):
                self.sizes.append(tensor.nbytes)
        return out


@pytest.mark.parametrize("frozen", [[], [0, 2]])
@pytest.mark.parametrize("make", [cg, pcg, neumann])
def test_what_a_step_allocates_is_tiles(make: type, frozen: list[int], threads: int) -> None:
    step = make(5, 2**19, torch.float32)
    step.state[0, frozen] = status.CONVERGED
    with Allocations(*(v for v in vars(step).values() if isinstance(v, Tensor))) as allocations:
        step.launch(reference)
    tile = 8 * TILE
    assert 0 < max(allocations.sizes) <= 3 * tile < step.x.nbytes


@pytest.mark.parametrize("n", LENGTHS)
def test_row_norms_are_the_exact_norms_rounded(n: int) -> None:
    v = randn(5, n, torch.float32, seed=3)
    norms = row_norms(v)
    # Squares of float32 numbers are exact in float64; sqrt halves the sum's relative error.
    bound = n**0.5 * torch.finfo(F64).eps
    torch.testing.assert_close(norms, v.double().norm(dim=1), rtol=bound, atol=0)
    assert torch.equal(row_norms(v[3:4]), norms[3:4])


def test_row_norms_hold_for_all_finite_float32_numbers() -> None:
    largest, smallest = torch.finfo(torch.float32).max, 2.0**-149
    v = torch.zeros(3, 16)
    v[0], v[1, :4] = largest, smallest
    assert row_norms(v).tolist() == [4 * largest, 2 * smallest, 0]
    assert row_norms(v[:0]).shape == (0,)


@pytest.mark.parametrize("n", LENGTHS)
def test_row_dots_are_the_exact_dots_rounded(n: int) -> None:
    a, b = (randn(5, n, torch.float32, seed) for seed in (3, 4))
    dots = row_dots(a, b)
    products = a.double() * b.double()  # exact for float32 numbers
    exact = torch.tensor([math.fsum(row) for row in products.tolist()], dtype=F64)
    bound = n**0.5 * torch.finfo(F64).eps * products.abs().sum(1)
    assert ((dots - exact).abs() <= bound).all()
    assert torch.equal(row_dots(a[3:4], b[3:4]), dots[3:4])


def test_row_dots_hold_for_all_finite_float32_numbers() -> None:
    largest, smallest = torch.finfo(torch.float32).max, 2.0**-149
    a, b = torch.zeros(3, 16), torch.zeros(3, 16)
    a[0], b[0] = largest, -largest
    a[1, :4], b[1, :4] = smallest, smallest
    a[2], b[2] = largest, smallest
    dots = [-16 * largest**2, 4 * smallest**2, 16 * largest * smallest]
    assert row_dots(a, b).tolist() == dots
    assert row_dots(a[:0], b[:0]).shape == (0,)


@pytest.mark.parametrize("n", LENGTHS)
def test_row_weighted_squares_are_the_exact_sums_rounded(n: int) -> None:
    v, weights = (randn(5, n, torch.float32, seed) for seed in (3, 4))
    sums = row_weighted_squares(v, weights)
    terms = v.double().square() * weights.double()  # the square is exact, the product rounded
    exact = torch.tensor([math.fsum(row) for row in terms.tolist()], dtype=F64)
    bound = n**0.5 * torch.finfo(F64).eps * terms.abs().sum(1)
    assert ((sums - exact).abs() <= bound).all()
    assert torch.equal(row_weighted_squares(v[3:4], weights[3:4]), sums[3:4])


@pytest.mark.gpu
@pytest.mark.parametrize("make", [cg, pcg])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_runs_on_a_gpu(make: type, dtype: torch.dtype) -> None:
    step = make(3, 1000, dtype)
    done = Target(reference, "cuda").run(step)
    for name, close in cg_oracle(step).items():
        close.check(getattr(done, name).sum(1) if "_out" in name else getattr(done, name))
    norms = row_norms(step.r.to("cuda")).cpu()
    torch.testing.assert_close(norms, row_norms(step.r), rtol=1000**0.5 * 2.0**-52, atol=0)
    dots = row_dots(step.r.to("cuda"), step.p.to("cuda")).cpu()
    bound = 1000**0.5 * 2.0**-52 * (step.r.double() * step.p.double()).abs().sum(1)
    assert ((dots - row_dots(step.r, step.p)).abs() <= bound).all()


def test_no_memory_is_kept_but_the_threads_room() -> None:
    """Rows so short that their padding is most of a tile: several times the room."""
    rows = torch.ones(2**17, 1)
    with torch.inference_mode():
        assert torch.equal(row_norms(rows), torch.ones(2**17, dtype=F64))
    assert torch.equal(row_norms(rows), torch.ones(2**17, dtype=F64))
    kept = {room.first.untyped_storage().data_ptr() for room in dots._ROOM.views.values()}
    assert kept <= {dots._ROOM.memory.untyped_storage().data_ptr()}


def test_one_partial_sum_a_row() -> None:
    assert [reference.partial_count(ld) for ld in (16, 10**7)] == [1, 1]
    assert partial_count(10**7, "cpu") == 1
    assert backend("auto", "cpu", torch.float32) is reference


def test_the_default_device_does_not_matter() -> None:
    step = cg(3, 5000, torch.float32)
    expected = TARGET.run(step)
    torch.set_default_device("meta")
    try:
        done = TARGET.run(step)
    finally:
        torch.set_default_device(None)
    assert bits_equal(done, expected)
