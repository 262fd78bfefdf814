"""A product in half precision: read as it is, for the other vectors are float32 or float64."""

from __future__ import annotations

import pytest
import torch

import tritonimplicit_kernels as kernels
from tests.kernels.bicgstab_problems import RESULTS as BICGSTAB_RESULTS
from tests.kernels.bicgstab_problems import SUMS, BiCGSTAB, bicgstab, oracle, pbicgstab
from tests.kernels.problems import (
    CG,
    DTYPES,
    PCG,
    Step,
    Target,
    cg,
    cg_oracle,
    neumann,
    neumann_oracle,
    pcg,
)

HALF = [torch.float16, torch.bfloat16]
RESULTS = ("x", "r", "p", "dots", "rr_out", "rz_out", "state_out", "residual_sq")
every_half = pytest.mark.parametrize("half", HALF)


def with_half_product(step: Step, half: torch.dtype) -> tuple[Step, Step]:
    """Return two steps: with the product rounded to `half`, and with the same in the vectors'."""
    name = "ap" if isinstance(step, CG) else "ax"
    rounded = step.to("cpu")
    setattr(rounded, name, getattr(step, name).to(half))
    setattr(step, name, getattr(rounded, name).to(step.x.dtype))
    return rounded, step


@pytest.mark.parametrize("dtype", DTYPES)
@every_half
@pytest.mark.parametrize(("batch", "n", "count"), [(1, 4099, 2), (3, 1000, 2)])
@pytest.mark.parametrize("make", [cg, pcg, neumann])
def test_a_half_product_gives_the_bits_of_the_same_product_widened(
    target: Target,
    make: type,
    batch: int,
    n: int,
    count: int,
    half: torch.dtype,
    dtype: torch.dtype,
) -> None:
    rounded, step = with_half_product(make(batch, n, dtype, count), half)
    done, expected = target.run(rounded), target.run(step)
    for name in RESULTS:
        if hasattr(done, name):
            assert torch.equal(getattr(done, name), getattr(expected, name)), name
    oracle = cg_oracle(step) if isinstance(step, CG) else neumann_oracle(step)
    for name, close in oracle.items():
        actual = getattr(done, name)
        close.check(actual.sum(1) if name in ("rr_out", "rz_out") else actual)


@pytest.mark.parametrize("dtype", DTYPES)
@every_half
@pytest.mark.parametrize(("batch", "n", "count"), [(1, 4099, 2), (3, 1000, 2)])
@pytest.mark.parametrize("make", [bicgstab, pbicgstab])
def test_half_products_give_bicgstab_the_bits_of_the_same_widened(
    target: Target,
    make: type,
    batch: int,
    n: int,
    count: int,
    half: torch.dtype,
    dtype: torch.dtype,
) -> None:
    step: BiCGSTAB = make(batch, n, dtype, count)
    done, expected = (step.to(target.device) for _ in range(2))
    for each, width in ((done, half), (expected, dtype)):
        each.v = each.v.to(half).to(width)
        each.launch_dots(target.backend)
        each.launch_half_step(target.backend)
        each.multiply()
        each.t = each.t.to(half).to(width)
        each.launch_half_dots(target.backend)
        each.launch_step(target.backend)
    done, expected = done.to("cpu"), expected.to("cpu")
    for name in BICGSTAB_RESULTS:
        assert torch.equal(getattr(done, name), getattr(expected, name)), name
    step.v = expected.v
    for name, close in oracle(step, expected.t).items():
        actual = getattr(done, name)
        close.check(actual.sum(1) if name in SUMS else actual)


@every_half
def test_the_registered_ops_take_it(half: torch.dtype) -> None:
    (step, _), (richardson, _) = (
        with_half_product(make(2, 40, torch.float32, 2), half) for make in (pcg, neumann)
    )
    assert isinstance(step, PCG)
    step.dots[:] = 1.0
    dots = (step.p, step.ap, step.state, step.dots)
    torch.library.opcheck(torch.ops.tritonimplicit.cg_dots.default, dots)
    common = (step.rr, step.state, step.threshold, 9)
    outputs = (step.state_out, step.residual_sq.zero_())
    kernels.cg_step(*(step.x, step.r, step.p, step.ap, step.dots, *common, step.rr_out, *outputs))
    kernels.pcg_dots(step.p, step.ap, step.d, step.state, step.dots)
    kernels.neumann_step(
        *(richardson.x, richardson.ax, richardson.b, richardson.alpha, richardson.rr),
        *(richardson.state, richardson.threshold, richardson.limit, 9),
        *(richardson.rr_out, richardson.state_out, richardson.residual_sq),
    )
    assert step.x.isfinite().all() and richardson.x.isfinite().all()


@every_half
@pytest.mark.parametrize("make", [bicgstab, pbicgstab])
def test_the_registered_ops_of_bicgstab_take_it(make: type, half: torch.dtype) -> None:
    step: BiCGSTAB = make(2, 40, torch.float32, 2)
    step.v = step.v.to(half)
    step.launch_dots(kernels)  # type: ignore[arg-type]
    step.launch_half_step(kernels)  # type: ignore[arg-type]
    step.multiply()
    step.t = step.t.to(half)
    step.launch_half_dots(kernels)  # type: ignore[arg-type]
    step.launch_step(kernels)  # type: ignore[arg-type]
    assert all(getattr(step, name).isfinite().all() for name in BICGSTAB_RESULTS)
    dots = (step.shadow, step.v, step.state, step.shadow_dots)
    torch.library.opcheck(torch.ops.tritonimplicit.bicgstab_dots.default, dots)
    half_dots = (step.shadow, step.s, step.t, step.state, step.half_dots)
    torch.library.opcheck(torch.ops.tritonimplicit.bicgstab_half_dots.default, half_dots)


def test_what_a_step_updates_is_never_half() -> None:
    step = cg(2, 40, torch.float32)
    with pytest.raises(TypeError, match=r"ap must be torch\.float32 or half precision, not"):
        kernels.cg_dots(step.p, step.ap.double(), step.state, step.dots)
    with pytest.raises(TypeError, match="p must be float32 or float64"):
        kernels.cg_dots(step.p.half(), step.ap, step.state, step.dots)
