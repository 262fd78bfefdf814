"""The ops of a BiCGSTAB iteration: oracles, the rules of a step, bits, whole solves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.bicgstab_problems import (
    RESULTS,
    SUMS,
    VECTORS,
    BiCGSTAB,
    PBiCGSTAB,
    bicgstab,
    oracle,
    pbicgstab,
    solve,
)
from tests.kernels.problems import DTYPES, F64, Target, randn
from tests.kernels.test_steps import SIZES, same
from tritonimplicit_kernels import reference, row_dots, status
from tritonimplicit_kernels.reference import plain
from tritonimplicit_kernels.reference.tiles import TILE

every_form = pytest.mark.parametrize("make", [bicgstab, pbicgstab])


def results(step: BiCGSTAB) -> dict[str, Tensor]:
    return {name: getattr(step, name) for name in RESULTS}


def assert_same_bits(one: BiCGSTAB, other: BiCGSTAB) -> None:
    for name, value in results(one).items():
        assert same(value, getattr(other, name)), name


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "count"), SIZES[:-1])
def test_a_step_is_the_oracles(
    target: Target, make: type, batch: int, n: int, count: int, dtype: torch.dtype
) -> None:
    step: BiCGSTAB = make(batch, n, dtype, count)
    done = target.run(step)
    for name, close in oracle(step).items():
        actual = getattr(done, name)
        close.check(actual.sum(1) if name in SUMS else actual)
    assert done.state_out.tolist() == [[status.RUNNING] * batch, list(range(1, batch + 1))]
    torch.testing.assert_close(done.residual_sq, step.rr.sum(1))
    assert (done.rho != 0).all() and torch.equal(done.shadow, step.shadow)
    assert not done.x[:, n:].any() and not done.p[:, n:].any()
    assert not any(getattr(done, name).isnan().any() for name in RESULTS)


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_start_takes_its_residual_for_shadow_residual(
    target: Target, make: type, dtype: torch.dtype
) -> None:
    step: BiCGSTAB = make(3, 1000, dtype, 2)
    step.shadow = step.r.clone()
    step.rho = row_dots(step.r, step.r)
    expected = oracle(step)
    step.rho.zero_()
    done = target.run(step)
    for name, close in expected.items():
        close.check(getattr(done, name).sum(1) if name in SUMS else getattr(done, name))


CASES = {
    "goes on": status.RUNNING,
    "goes on afresh": status.RUNNING,
    "r^.v lost": status.RUNNING,
    "has converged": status.CONVERGED,
    "has converged at maxiter": status.CONVERGED,
    "has converged beyond the limit": status.CONVERGED,
    "is beyond the limit": status.DIVERGED,
    "is beyond the limit at maxiter": status.MAX_ITERATIONS,
    "is at the limit": status.RUNNING,
    "is at maxiter": status.MAX_ITERATIONS,
    "is at maxiter with r^.v lost afresh": status.MAX_ITERATIONS,
    "NaN residual at maxiter": status.NON_FINITE,
    "infinite residual": status.NON_FINITE,
    "NaN in v": status.NON_FINITE,
    "infinity in v afresh": status.NON_FINITE,
    "r^.v lost afresh": status.BREAKDOWN,
    "r^.v lost by cancellation afresh": status.BREAKDOWN,
    **{f"frozen {code}": code for code in range(7)},
}


def cases(make: type, dtype: torch.dtype) -> BiCGSTAB:
    step: BiCGSTAB = make(len(CASES), 20, dtype)
    at = {name: b for b, name in enumerate(CASES)}

    def rows(words: str) -> list[int]:
        return [b for name, b in at.items() if words in name]

    step.rho[rows("afresh")] = 0
    step.shadow[rows("afresh")] = step.r[rows("afresh")]
    step.v[rows("r^.v lost")] = 0
    step.state[1, rows("at maxiter")] = step.maxiter
    step.threshold[rows("has converged")] = step.rr[rows("has converged")].sum(1)
    step.limit[rows("beyond the limit")] = step.rr[rows("beyond the limit")].sum(1) / 2
    step.limit[rows("at the limit")] = step.rr[rows("at the limit")].sum(1)
    step.rr[at["NaN residual at maxiter"]] = torch.nan
    step.rr[at["infinite residual"]] = torch.inf
    step.v[at["NaN in v"], 3] = torch.nan
    step.v[at["infinity in v afresh"], 3] = torch.inf
    row = at["r^.v lost by cancellation afresh"]
    step.r[row], step.v[row] = 0, 0
    # Relative to |r^| |v|, r^.v is half the eps that is too little.
    step.r[row, 0], step.v[row, :2] = 1, torch.tensor([torch.finfo(dtype).eps / 2, 1])
    step.shadow[row] = step.r[row]
    step.state[0, rows("frozen")] = torch.arange(7, dtype=torch.int32)
    for name in VECTORS:
        if hasattr(step, name):
            getattr(step, name)[at["frozen 6"]] = torch.nan
    step.residual_sq[rows("frozen")] = 7.0
    return step


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_system_comes_to_its_own_status(
    target: Target, make: type, dtype: torch.dtype
) -> None:
    step = cases(make, dtype)
    done = target.run(step)
    assert dict(zip(CASES, done.state_out[0].tolist(), strict=True)) == CASES
    for b, (name, code) in enumerate(CASES.items()):
        frozen = name.startswith("frozen")
        assert done.state_out[1, b] == step.state[1, b] + (code < 0), name
        assert same(done.residual_sq[b], torch.tensor(7.0) if frozen else step.rr[b].sum()), name
        if code < 0:
            assert_same_bits(target.run(step.select([b])), done.select([b]))
            assert done.rr_out[b].sum() > 0 and done.ss[b].sum() > 0, name
        else:
            assert not done.rr_out[b].any() and not done.ss[b].any(), name
            assert not done.half_dots[:, b].any(), name
            untouched = [v for v in (*VECTORS, "rho", "alpha") if hasattr(step, v)]
            assert all(same(getattr(done, v)[b], getattr(step, v)[b]) for v in untouched), name
        if frozen:
            assert not done.shadow_dots[:, b].any(), name


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_a_denominator_is_lost_it_begins_afresh(
    target: Target, make: type, dtype: torch.dtype
) -> None:
    step: BiCGSTAB = make(5, 20, dtype)
    step.v[0] = 0  # alpha
    step.diagonal[1] = 0  # omega: t = 0
    step.threshold[2] = torch.inf  # omega: s is enough; but r has to be above, see below
    step.rr[2] = torch.inf
    step.shadow[3] = 0  # rho: r^.s and r^.t; and r^.v, as it must be with a shadow of zero
    done = step.to(target.device)
    done.launch_dots(target.backend)
    step.rr[2], done.rr[2] = 1.0, 1.0
    done.threshold[2] = 0.5
    done.launch_half_step(target.backend)
    done.threshold[2] = 1e9
    done.multiply()
    done.launch_half_dots(target.backend)
    s = done.r.clone()
    done.launch_step(target.backend)
    done, s = done.to("cpu"), s.to("cpu")
    assert done.state_out[0].tolist() == [status.RUNNING] * 5
    assert done.rho[:4].tolist() == [0] * 4 and done.rho[4] != 0
    for b in range(4):
        assert torch.equal(done.p[b], done.r[b]) and torch.equal(done.shadow[b], done.r[b])
    assert done.alpha[0] == 0 and done.alpha[3] == 0
    assert torch.equal(s[0], step.r[0]) and not torch.equal(done.r[0], s[0])
    assert torch.equal(done.r[1], s[1]) and torch.equal(done.r[2], s[2])
    assert not torch.equal(done.x[2], step.x[2])
    torch.testing.assert_close(done.rr_out.sum(1), row_dots(done.r, done.r) * step.unit.square())


@every_form
def test_where_the_square_of_the_second_product_underflows_it_begins_afresh(
    target: Target, make: type
) -> None:
    step: BiCGSTAB = make(2, 20, F64)
    step.diagonal[0] *= 1e-170
    done = target.run(step)
    assert done.half_dots[1, 0].sum() == 0 and done.half_dots[0, 0].sum() != 0  # t.t and t.s
    assert done.rho[0] == 0 and done.rho[1] != 0
    assert torch.equal(done.p[0], done.r[0]) and torch.equal(done.shadow[0], done.r[0])
    assert done.p.isfinite().all() and done.x.isfinite().all()
    assert not torch.equal(done.x[0], step.x[0])  # the first half is done
    assert_same_bits(target.run(step.select([0])), done.select([0]))


@every_form
def test_where_what_beta_is_divided_by_underflows_it_begins_afresh(
    target: Target, make: type
) -> None:
    step: BiCGSTAB = make(2, 20, F64)
    # r^.v is of the order of 1e-270, omega of 1e-100: each is there, their product is not.
    step.v[0] *= 1e-150
    step.shadow[0] *= 1e-120
    step.rho[0] *= 1e-270
    step.diagonal[0] *= 1e100
    done = target.run(step)
    omega = done.half_dots[0].sum(1) / done.half_dots[1].sum(1)
    along = done.shadow_dots[0].sum(1)
    assert along[0] != 0 and omega[0] != 0 and along[0] * omega[0] == 0
    assert done.rho[0] == 0 and done.rho[1] != 0
    assert torch.equal(done.p[0], done.r[0]) and torch.equal(done.shadow[0], done.r[0])
    assert done.p.isfinite().all() and done.x.isfinite().all()
    assert_same_bits(target.run(step.select([0])), done.select([0]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@every_form
def test_a_second_product_that_is_not_finite_shows_in_x_and_the_residual(
    target: Target, make: type, bad: float
) -> None:
    step: BiCGSTAB = make(3, 20, torch.float32)
    step.diagonal[1, 3] = bad
    done = target.run(step)
    assert done.rr_out.sum(1).isfinite().tolist() == [True, False, True]
    assert done.x.isfinite().all(1).tolist() == [True, False, True]
    assert not done.x[1].isfinite().any()
    assert_same_bits(target.run(step.select([0, 2])), done.select([0, 2]))


@every_form
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_float32_dots_neither_underflow_nor_overflow(
    target: Target, make: type, scale: float
) -> None:
    step: BiCGSTAB = make(2, 100, torch.float32)  # with a matrix at this scale
    for name in ("v", "diagonal"):
        getattr(step, name).mul_(scale)
    step.unit *= scale  # so that x, about A^-1 b, stays
    step.rr *= scale**2
    done = target.run(step)
    assert done.state_out[0].tolist() == [status.RUNNING] * 2 and (done.rho != 0).all()
    for name, close in oracle(step).items():
        # Gradual underflow: what falls below the smallest normal number errs by a subnormal's unit.
        close.bound += 2.0**-148 if name in VECTORS else 0
        close.check(getattr(done, name).sum(1) if name in SUMS else getattr(done, name))


def nonsymmetric(batch: int, n: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(batch, n, n, generator=generator, dtype=F64) / n**0.5
    return (torch.eye(n, dtype=F64) + 0.4 * noise).to(dtype)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (F64, 1e-10)])
def test_bicgstab_solves(
    target: Target, dtype: torch.dtype, rtol: float, preconditioned: bool
) -> None:
    matrix, b, inverse = nonsymmetric(3, 48, dtype), randn(3, 48, dtype, seed=5), None
    if preconditioned:
        spread = torch.logspace(0, 4, 48, dtype=dtype)
        matrix, inverse = matrix * spread, (1 / spread).repeat(3, 1)
    matrix[1] = 3 * torch.eye(48)  # one step: frozen beside the others
    inverse = None if inverse is None else inverse.index_fill(0, torch.tensor([1]), 1.0)
    done = solve(target, matrix, b, rtol, 100, inverse)
    assert done.state[0].tolist() == [status.CONVERGED] * 3
    assert done.state[1, 1] == 1 < done.state[1, 0] <= 40
    residual = b.double() - (matrix.double() @ done.x.double()[:, :, None])[:, :, 0]
    # The recurrence's residual strays from the true one by about eps a step and term of A x.
    size = (matrix.double().abs() @ done.x.double().abs()[:, :, None]).norm(dim=1)[:, 0]
    drift = 2 * done.state[1].max() * torch.finfo(dtype).eps * (size + b.norm(dim=1))
    assert (residual.norm(dim=1) <= rtol * b.double().norm(dim=1) + drift).all()


@every_form
def test_no_systems_are_no_work(target: Target, make: type) -> None:
    assert target.run(make(2, 16, F64).select([])).x.shape == (0, 16)


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n"), [(3, 17), (1, 4099)])
def test_given_the_same_dots_the_vectors_are_the_references(
    triton_target: Target, make: type, batch: int, n: int, dtype: torch.dtype
) -> None:
    expected: BiCGSTAB = make(batch, n, dtype)
    expected.v[0] = 0  # will begin afresh
    expected.rho[1:2] = 0  # begins afresh
    done = expected.to(triton_target.device)
    runs = (expected, reference), (done, triton_target.backend)
    for op in ("dots", "half_step", "half_dots", "step"):
        if op == "half_dots":
            expected.multiply()
            done.multiply()
        for each, backend in runs:
            getattr(each, f"launch_{op}")(backend)
        for name in SUMS:  # are added in another order: take the reference's
            ours, theirs = getattr(done, name), getattr(expected, name)
            if not theirs.isnan().any():
                bound = n * 2.0**-52 * theirs.abs().max()
                assert ((ours.cpu() - theirs).abs() <= bound).all(), name
                ours.copy_(theirs)
    assert_same_bits(done.to("cpu"), expected)


@every_form
def test_a_system_is_the_same_alone_and_in_a_batch_and_again(
    triton_target: Target, make: type
) -> None:
    step: BiCGSTAB = make(3, 2500, torch.float32, 2)
    together = triton_target.run(step)
    assert_same_bits(triton_target.run(step.select([1])), together.select([1]))
    assert_same_bits(triton_target.run(step), together)


@pytest.mark.gpu
@every_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row_is_the_oracles(make: type, dtype: torch.dtype) -> None:
    """Every chunk has several blocks; too long for the interpreter."""
    from tritonimplicit_kernels import backend

    target = Target(backend("triton", "cuda", dtype), "cuda")
    step: BiCGSTAB = make(2, 3 * 10**6 + 5, dtype, target.backend.partial_count(3 * 10**6 + 16))
    done = target.run(step)
    for name, close in oracle(step).items():
        close.check(getattr(done, name).sum(1) if name in SUMS else getattr(done, name))


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_programs_does_not_matter(seed: int) -> None:
    from tests.kernels.test_triton import shuffled_programs
    from tritonimplicit_kernels import backend

    target = Target(backend("triton", "cpu", torch.float32), "cpu")
    for make in (bicgstab, pbicgstab):
        step = make(3, 6000, torch.float32, 3)
        step.v[1] = 0  # begins afresh, and writes its shadow
        with shuffled_programs(seed):
            shuffled = target.run(step)
        assert_same_bits(shuffled, target.run(step))
    matrix, b = nonsymmetric(2, 48, F64), randn(2, 48, F64, seed=1)
    with shuffled_programs(seed):
        shuffled = solve(target, matrix, b, rtol=1e-2, maxiter=10)
    assert_same_bits(shuffled, solve(target, matrix, b, rtol=1e-2, maxiter=10))


# --- The reference --------------------------------------------------------------------------------

TARGET = Target(reference, "cpu")
# One chunk, several with a tail, rows of which two fit in no tile, a row of two tiles.
LENGTHS = [48, 5000, TILE // 2 + 16, TILE + 5008]


def assert_the_plain_forms_bits(step: BiCGSTAB) -> None:
    done, expected = TARGET.run(step), step.to("cpu")
    expected.launch(plain)  # type: ignore[arg-type]
    assert_same_bits(done, expected)


@settings(deadline=None)
@given(
    data=st.data(), batch=st.sampled_from([1, 2, 7]), make=st.sampled_from([bicgstab, pbicgstab])
)
def test_any_state_gives_the_plain_forms_bits(data: st.DataObject, batch: int, make: type) -> None:
    step: BiCGSTAB = make(batch, data.draw(st.sampled_from(LENGTHS[:2])), torch.float32, 3)
    vectors = [getattr(step, name) for name in (*VECTORS, "diagonal") if hasattr(step, name)]
    for row in range(batch):
        unit = data.draw(st.sampled_from([1.0, 1e-30, 1e15, 1e30]))
        step.unit[row] *= unit
        step.rr[row] *= unit**2
        step.state[0, row] = data.draw(st.sampled_from([-1, -1, -1, -1, 0, 6]))
        step.state[1, row] = data.draw(st.sampled_from([0, 0, 999, 1000]))
        step.threshold[row] = unit**2 * data.draw(st.sampled_from([0, 0, 0, 1.0, 1e70]))
        step.limit[row] = data.draw(st.sampled_from([torch.inf, torch.inf, 1e-3]))
        step.rho[row] *= data.draw(st.sampled_from([1.0, 1.0, 0.0]))
        step.residual_sq[row] = 7.0
        step.alpha[row] = 7.0
        data.draw(st.sampled_from(vectors))[row] *= data.draw(st.sampled_from([1.0, 0.0, -1.0]))
        element = data.draw(st.sampled_from([1.0, 1.0, torch.nan, torch.inf]))
        data.draw(st.sampled_from(vectors))[row, 5] = element
    assert_the_plain_forms_bits(step)


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_tiles_and_scattered_rows_give_the_plain_forms_bits(
    make: type, n: int, dtype: torch.dtype
) -> None:
    step: BiCGSTAB = make(4, n, dtype)
    step.alpha[:] = step.residual_sq[:] = 7.0
    assert_the_plain_forms_bits(step)
    step.v[1] = 0  # begins afresh
    assert_the_plain_forms_bits(step)
    step.state[0, [0, 2]] = status.STAGNATED
    assert_the_plain_forms_bits(step)
    assert_the_plain_forms_bits(step.select([3]))


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_alone_gives_the_plain_forms_bits(make: type, dtype: torch.dtype) -> None:
    step = cases(make, dtype)
    step.alpha[:] = 7.0
    for b in range(len(CASES)):
        assert_the_plain_forms_bits(step.select([b]))


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16, 1008, 16400, 70000])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_reference_system_is_the_same_alone_and_in_a_batch(
    make: type, n: int, dtype: torch.dtype, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step: BiCGSTAB = make(7, n, dtype, 3)
        step.v[2] = 0
        together = TARGET.run(step)
        for systems in ([0], [2], [3, 5], [1, 2, 3, 4, 5, 6]):
            assert_same_bits(TARGET.run(step.select(systems)), together.select(systems))
        step.state[0, [0, 3, 4]] = status.CONVERGED
        step.x[[0, 3, 4]] = torch.nan
        running = [1, 2, 5, 6]
        assert_same_bits(TARGET.run(step).select(running), together.select(running))
    finally:
        torch.set_num_threads(before)


@every_form
def test_off_the_cpu_nothing_is_read_by_the_host(make: type) -> None:
    step = make(3, 5000, torch.float32).to("meta")  # has no numbers: to read one is an error
    step.launch(reference)


@pytest.mark.parametrize("make", [bicgstab, pbicgstab])
def test_an_iteration_compiles_in_one_graph(make: type) -> None:
    import tritonimplicit_kernels as kernels

    step: BiCGSTAB = make(3, 40, torch.float32)
    expected, got = step.to("cpu"), step.to("cpu")
    expected.launch(kernels)  # type: ignore[arg-type]

    def iteration(tensors: dict[str, Tensor]) -> None:
        type(got)(**tensors, maxiter=step.maxiter).launch(kernels)  # type: ignore[arg-type]

    tensors = {name: value for name, value in vars(got).items() if name != "maxiter"}
    torch.compile(iteration, backend="aot_eager", fullgraph=True)(tensors)
    assert_same_bits(got, expected)
    assert isinstance(got, PBiCGSTAB) == (make is pbicgstab)
