"""The reference's forms: tiles and Python's floats write the plain form's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.problems import (
    CG,
    DTYPES,
    F64,
    PCG,
    Neumann,
    Step,
    Target,
    cg,
    neumann,
    pcg,
)
from tests.kernels.test_steps import CG_CASES, PCG_CASES, cg_cases, pcg_cases, same
from tritonimplicit_kernels import reference, status
from tritonimplicit_kernels.reference import few, plain
from tritonimplicit_kernels.reference.rules import decide_cg
from tritonimplicit_kernels.reference.tiles import TILE

RESULTS = ("x", "r", "p", "dots", "rr_out", "rz_out", "state_out", "residual_sq")
# Short rows, rows of which two fit in no tile, a row of two tiles.
LENGTHS = [48, 5000, TILE // 2 + 16, TILE + 5008]


def assert_the_plain_forms_bits(step: Step) -> None:
    done = Target(reference, "cpu").run(step)
    expected = step.to("cpu")
    expected.launch(plain)
    for name in RESULTS:
        if hasattr(step, name):
            assert same(getattr(done, name), getattr(expected, name)), name


@settings(deadline=None)
@given(data=st.data(), batch=st.sampled_from([1, 2, 7]), make=st.sampled_from([cg, pcg, neumann]))
def test_any_state_gives_the_plain_forms_bits(data: st.DataObject, batch: int, make: type) -> None:
    step: Step = make(batch, data.draw(st.sampled_from(LENGTHS[:2])), torch.float32, 3)
    draw_state(step, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few, "MOST", data.draw(st.sampled_from([0, few.MOST])))
        assert_the_plain_forms_bits(step)


def draw_state(step: Step, data: st.DataObject) -> None:
    """Let systems be at any scale, frozen or not, met or not by any rule, with or without NaN."""
    names = ("x", "r", "p", "ap", "ax", "b")
    vectors = [getattr(step, name) for name in names if hasattr(step, name)]
    for row in range(step.x.shape[0]):
        scale = data.draw(st.sampled_from([1.0, 1e-30, 1e-15, 1e15, 1e30]))
        for vector in vectors:
            vector[row] *= scale
        step.rr[row] *= scale**2
        if isinstance(step, PCG):
            step.rz[row] *= data.draw(st.sampled_from([scale**2, 0.0, -1.0, torch.nan, torch.inf]))
            step.d[row, 5] = data.draw(st.sampled_from([1.0, -1e9, 0.0, torch.nan, torch.inf]))
        step.state[0, row] = data.draw(st.sampled_from([-3, -2, -2, -2, -1, 0, 6]))
        step.state[1, row] = data.draw(st.sampled_from([0, 999, 1000]))
        step.threshold[row] = data.draw(st.sampled_from([0, 0, 1e-3, 1e70]))
        step.residual_sq[row] = 7.0
        if isinstance(step, Neumann):
            step.limit[row] = data.draw(st.sampled_from([torch.inf, 1.2]))
        vector = data.draw(st.sampled_from(vectors))
        vector[row, 5] = data.draw(st.sampled_from([1.0, -1.0, torch.nan, torch.inf]))
        if data.draw(st.booleans()):
            vectors[-1][row] *= -1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("make", [cg, pcg, neumann])
def test_tiles_and_scattered_rows_give_the_plain_forms_bits(
    make: type, n: int, dtype: torch.dtype
) -> None:
    step: Step = make(4, n, dtype)
    assert_the_plain_forms_bits(step)
    step.state[0, [0, 2]] = status.STAGNATED
    step.residual_sq[:] = 7.0
    assert_the_plain_forms_bits(step)


def decide(rule: Callable[..., Any], step: CG) -> Any:
    return rule(
        *(step.dots, step.rr, step.rz if isinstance(step, PCG) else step.rr),
        *(step.state, step.threshold, step.maxiter),
        *(step.state_out, step.residual_sq, step.x.dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PCG_CASES)
@pytest.mark.parametrize(
    "beside",
    [[], ["advances"], ["advances with a negative matrix"], ["has converged", "p.Ap zero"]],
)
def test_a_few_systems_are_decided_by_the_rules(
    case: str, beside: list[str], dtype: torch.dtype
) -> None:
    check_few_systems(pcg_cases(dtype), case, PCG_CASES, beside)
    if case in CG_CASES:
        check_few_systems(cg_cases(dtype), case, CG_CASES, beside)


def check_few_systems(step: CG, case: str, cases: dict[str, int], beside: list[str]) -> None:
    step.launch_dots(reference)
    step = step.select([list(cases).index(name) for name in [case, *beside]])
    one_by_one, ruled = step.to("cpu"), step.to("cpu")
    advances, *scales = decide(few.decide_cg, one_by_one)
    expected_advances, *expected_scales = decide(decide_cg, ruled)
    assert advances == expected_advances.tolist()
    assert torch.equal(one_by_one.state_out, ruled.state_out)
    assert same(one_by_one.residual_sq, ruled.residual_sq)
    for ours, theirs in zip(scales, expected_scales, strict=True):
        ours = torch.as_tensor(ours, dtype=F64).to(step.x.dtype).expand_as(theirs)
        assert torch.equal(ours[advances], theirs[advances])


@pytest.mark.parametrize("make", [cg, pcg, neumann])
def test_off_the_cpu_nothing_is_read_by_the_host(make: type) -> None:
    step = make(3, 5000, torch.float32).to("meta")  # has no numbers: to read one is an error
    step.launch(reference)
    with pytest.raises((RuntimeError, NotImplementedError)):
        step.state.tolist()
