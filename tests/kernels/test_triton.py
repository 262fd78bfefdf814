"""The Triton kernels alone: the reference's bits, and no dependence on the order of programs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.kernels.histories import anderson, arnoldi
from tests.kernels.problems import (
    CG,
    DTYPES,
    F64,
    PCG,
    Step,
    Target,
    cg,
    neumann,
    pcg,
    randn,
    solve_cg,
)
from tritonimplicit_kernels import backend, reference

triton = pytest.importorskip("triton", reason="triton is a dependency on Linux only")
tl = triton.language


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Run the interpreter's programs, else in order, in a random one."""
    from triton.runtime.interpreter import interpreter_builder as builder

    generator = random.Random(seed)
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, int, int]] = []

    def shuffle(*grid: int) -> None:
        order[:] = [
            (x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])
        ]
        generator.shuffle(order)
        set_dim(*grid)

    builder.set_grid_dim = shuffle
    builder.set_grid_idx = lambda *_: set_idx(*order.pop())
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_dim, set_idx


def results(step: Step) -> dict[str, Tensor]:
    names = ("x", "r", "p", "dots", "rr_out", "rz_out", "state_out", "residual_sq")
    return {name: getattr(step, name) for name in names if hasattr(step, name)}


def assert_same_bits(one: Step, other: Step) -> None:
    for name, value in results(one).items():
        assert torch.equal(value, getattr(other, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n"), [(3, 17), (1, 4099)])
@pytest.mark.parametrize("make", [cg, pcg, neumann])
def test_given_the_same_dots_the_vectors_are_the_references(
    triton_target: Target, make: type, batch: int, n: int, dtype: torch.dtype
) -> None:
    step = make(batch, n, dtype)
    if isinstance(step, CG):  # sums are added in another order: take the reference's
        step.launch_dots(reference)
    expected, done = step.to("cpu"), step.to(triton_target.device)
    for each, run in ((expected, reference), (done, triton_target.backend)):
        each.launch_step(run) if isinstance(each, CG) else each.launch(run)
    done = done.to("cpu")
    torch.testing.assert_close(done.rr_out, expected.rr_out, rtol=n * 2.0**-52, atol=0)
    done.rr_out = expected.rr_out
    if isinstance(done, PCG):
        torch.testing.assert_close(done.rz_out, expected.rz_out, rtol=n * 2.0**-52, atol=0)
        done.rz_out = expected.rz_out
    assert_same_bits(done, expected)


@pytest.mark.parametrize("make", [cg, pcg, neumann])
def test_a_system_is_the_same_alone_and_in_a_batch(triton_target: Target, make: type) -> None:
    step = make(3, 2500, torch.float32, 2)
    together = triton_target.run(step)
    assert_same_bits(triton_target.run(step.select([1])), together.select([1]))


@pytest.mark.parametrize("make", [cg, pcg, neumann])
def test_a_step_repeats_its_bits(triton_target: Target, make: type) -> None:
    step = make(3, 2500, torch.float32, 2)
    assert_same_bits(triton_target.run(step), triton_target.run(step))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [cg, pcg, neumann])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row_beside_the_reference(make: type, dtype: torch.dtype) -> None:
    """Every chunk has several blocks; too long for the interpreter."""
    target = Target(backend("triton", "cuda", dtype), "cuda")
    step = make(2, 3 * 10**6 + 5, dtype, target.backend.partial_count(3 * 10**6 + 16))
    expected, done = Target(reference, "cpu").run(step), target.run(step)
    unit = 4 * torch.finfo(dtype).eps + 4 * step.x.shape[1] ** 0.5 * torch.finfo(F64).eps
    for name, value in results(expected).items():
        if name in ("dots", "rr_out", "rz_out"):
            sums = getattr(done, name).sum(-1)
            torch.testing.assert_close(sums, value.sum(-1), rtol=unit, atol=0)
        elif value.is_floating_point():
            torch.testing.assert_close(getattr(done, name), value, rtol=unit, atol=8 * unit)
        else:
            assert torch.equal(getattr(done, name), value)


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_programs_does_not_matter(seed: int) -> None:
    target = Target(backend("triton", "cpu", torch.float32), "cpu")
    for make in (cg, pcg, neumann):
        step = make(2, 6000, torch.float32, 3)
        with shuffled_programs(seed):
            shuffled = target.run(step)
        assert_same_bits(shuffled, target.run(step))
    for problem in (arnoldi, anderson):
        history = problem(2, 3000, torch.float32, parts=3)
        shuffled_history, expected = history.to("cpu"), history.to("cpu")
        with shuffled_programs(seed):
            shuffled_history.launch(target.backend)
        expected.launch(target.backend)
        for name, value in expected.tensors().items():
            assert torch.equal(value.nan_to_num(), shuffled_history.tensors()[name].nan_to_num())
    b, diagonal = randn(2, 2100, F64, seed=1), torch.linspace(1, 3, 2112, dtype=F64).repeat(2, 1)
    for d in (None, 1 / diagonal.sqrt()):
        with shuffled_programs(seed):
            shuffled = solve_cg(target, diagonal, b, rtol=1e-2, maxiter=10, d=d)
        assert_same_bits(shuffled, solve_cg(target, diagonal, b, rtol=1e-2, maxiter=10, d=d))


@triton.jit
def _racing_kernel(x_ptr, scale_ptr, BLOCK: tl.constexpr):
    """Scale a block; the last program changes the scale that the others read."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) * scale)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(scale_ptr, 2 * scale)


@pytest.mark.interpreter
def test_shuffling_finds_a_race() -> None:
    def run() -> Tensor:
        x, scale = torch.ones(64), torch.ones(1)
        _racing_kernel[(4,)](x, scale, BLOCK=16)
        return x

    in_order = run()
    assert torch.equal(run(), in_order)  # repeating does not find it
    with shuffled_programs(0):
        assert not torch.equal(run(), in_order)
