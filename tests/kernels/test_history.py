"""The ops on a basis or history: oracles, masks, and bits that depend on nothing beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.histories import (
    Anderson,
    Arnoldi,
    History,
    anderson,
    arnoldi,
    combination_oracle,
    dots_oracle,
)
from tests.kernels.problems import DTYPES, EPS64, F64, Target
from tests.kernels.test_steps import same
from tritonimplicit_kernels import reference, status

# (batch, n, vectors, room for them, partial sums): one vector, room for no more, several blocks a
# chunk and tails, more room than a power of two, an odd n.
SIZES = [
    (2, 100, 1, 1, 1),
    (3, 1000, 3, 5, 2),
    (1, 4099, 5, 5, 3),
    (2, 600, 17, 20, 1),
    (5, 17, 2, 2, 1),
]
sizes = pytest.mark.parametrize(("batch", "n", "count", "capacity", "parts"), SIZES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
both = pytest.mark.parametrize("make", [arnoldi, anderson])


def dots_eps(target: Target, dtype: torch.dtype) -> float:
    """Dots with a basis are float64's, but on the CPU those of the reference, BLAS's."""
    blas = target.backend.name == "reference" and target.device == "cpu"
    return torch.finfo(dtype if blas else F64).eps


@dtypes
@sizes
def test_dots_are_the_oracles(
    target: Target,
    batch: int,
    n: int,
    count: int,
    capacity: int,
    parts: int,
    dtype: torch.dtype,
) -> None:
    step = arnoldi(batch, n, dtype, count, capacity, parts).to(target.device)
    step.launch_dots(target.backend)
    step = step.to("cpu")
    oracle = dots_oracle(step.basis[:count], step.w, dots_eps(target, dtype))
    oracle.check(step.first[:count].sum(-1))
    assert step.first[count:].isnan().all()


def test_a_long_rows_dots_are_no_less_accurate(target: Target) -> None:
    """All terms are positive: added up in float32 from one end to the other, they err by more."""
    n = 2**22 if target.backend.name == "reference" else 2**14  # few programs, in the interpreter
    step = arnoldi(1, n, torch.float32, count=2)
    step.w.abs_()
    step.basis.abs_()
    done = step.to(target.device)
    done.launch_dots(target.backend)
    expected = (step.basis[:2].double() * step.w.double()).sum(-1)
    bound = 2**8 * torch.finfo(torch.float32).eps  # sqrt(2^16), for spans of that length
    torch.testing.assert_close(done.to("cpu").first[:2].sum(-1), expected, rtol=bound, atol=0)


@dtypes
@sizes
def test_a_projection_is_the_oracles(
    target: Target,
    batch: int,
    n: int,
    count: int,
    capacity: int,
    parts: int,
    dtype: torch.dtype,
) -> None:
    step = arnoldi(batch, n, dtype, count, capacity, parts)
    step.launch_dots(reference)
    done = step.to(target.device)
    done.launch_project(target.backend)
    done = done.to("cpu")
    basis, eps = step.basis[:count], torch.finfo(dtype).eps
    combination_oracle(step.w, step.first[:count].sum(-1), basis, eps).check(done.w_out)
    oracle = dots_oracle(basis, done.w_out, dots_eps(target, dtype))
    oracle.check(done.second[:count].sum(-1))
    dots_oracle(done.w_out[None], done.w_out, EPS64).check(done.ww.sum(-1)[None])
    assert done.second[count:].isnan().all()
    assert not done.w_out[:, n:].any()


@dtypes
@sizes
def test_a_step_is_the_oracles(
    target: Target,
    batch: int,
    n: int,
    count: int,
    capacity: int,
    parts: int,
    dtype: torch.dtype,
) -> None:
    step = arnoldi(batch, n, dtype, count, capacity, parts)
    step.launch_dots(reference)
    step.launch_project(reference)
    done = step.to(target.device)
    done.launch_step(target.backend)
    done = done.to("cpu")
    first, second = step.first[:count].sum(-1), step.second[:count].sum(-1)  # (k, B)
    h, left = (first + second).T, step.left[:, :count]
    norm = (step.ww.sum(-1) - second.square().sum(0)).sqrt()
    dot = (left * h).sum(1)
    # Sums of a few float64 numbers; those of the dot product cancel.
    unit = 4 * (count + 4) * EPS64
    size = (left * h).abs().sum(1)
    torch.testing.assert_close(done.column[:, :count], h, rtol=unit, atol=0)
    torch.testing.assert_close(done.column[:, count], norm, rtol=unit, atol=0)
    growth, slack = -dot / norm, unit * size / norm
    assert ((done.left[:, count] - growth).abs() <= slack).all()
    left_sq = left.square().sum(1)
    expected = step.norm.square() / (left_sq + growth.square())
    bound = expected * (unit + 2 * growth.abs() * slack / (left_sq + growth.square()))
    assert ((done.rr_out.sum(1) - expected).abs() <= bound).all()
    assert done.state_out.tolist() == [[status.RUNNING] * batch, list(range(1, batch + 1))]
    torch.testing.assert_close(done.residual_sq, step.rr.sum(1))
    if count < capacity:
        oracle = combination_oracle(
            step.w_out, second, step.basis[:count], 2 * torch.finfo(dtype).eps
        )
        oracle.value, oracle.bound = oracle.value / norm[:, None], oracle.bound / norm[:, None]
        oracle.check(done.basis[count])
    assert same(done.basis[:count], step.basis[:count])
    assert done.basis[count + 1 :].isnan().all()


@dtypes
def test_twice_is_enough(target: Target, dtype: torch.dtype) -> None:
    """Next to nothing of w is outside of the basis: what is left is orthogonal all the same."""
    step = arnoldi(2, 500, dtype, count=4)
    eps, ld = torch.finfo(dtype).eps, step.w.shape[1]
    part = (torch.arange(1, 5, dtype=F64)[:, None, None] * step.basis[:4]).sum(0)
    step.w = (part + 100 * eps * step.w / step.w.norm(dim=1, keepdim=True)).to(dtype)
    done = step.to(target.device)
    done.launch(target.backend)
    done = done.to("cpu")
    grown = done.basis[:5].double()  # (5, B, ld)
    gram = torch.einsum("ibl,jbl->bij", grown, grown)
    # The basis that is given is orthonormal to rounding; the rest by the second projection.
    error = (gram - torch.eye(5, dtype=F64)).abs()
    assert (error <= 8 * ld**0.5 * eps).all() and (done.state_out[0] < 0).all()


CASES = {
    "advances": status.RUNNING,
    "is closed": status.RUNNING,
    "is singular": status.BREAKDOWN,
    "has converged": status.CONVERGED,
    "has converged at maxiter": status.CONVERGED,
    "is at maxiter": status.MAX_ITERATIONS,
    "is singular at maxiter": status.MAX_ITERATIONS,
    "NaN residual at maxiter": status.NON_FINITE,
    "infinite residual": status.NON_FINITE,
    "NaN in w": status.NON_FINITE,
    "infinity in w": status.NON_FINITE,
    **{f"frozen {code}": code for code in range(7)},
}


def cases(dtype: torch.dtype) -> Arnoldi:
    s = arnoldi(len(CASES), 20, dtype)
    s.basis[3:], s.column[:], s.left[:, 3:] = 7.0, 7.0, 7.0
    at = {name: b for b, name in enumerate(CASES)}
    s.state[1, [at[name] for name in CASES if "maxiter" in name]] = s.maxiter
    converged = [at[name] for name in CASES if "has converged" in name]
    s.threshold[converged] = s.rr[converged].sum(1)
    for name in ("is closed", "is singular", "is singular at maxiter"):
        s.w[at[name]] = s.basis[0, at[name]]  # in the span of the basis
        if "singular" in name:
            s.left[at[name], 0] = 0.0  # and g.h = 0
    s.rr[at["NaN residual at maxiter"]] = torch.nan
    s.rr[at["infinite residual"]] = torch.inf
    s.w[at["NaN in w"], 3], s.w[at["infinity in w"], 3] = torch.nan, torch.inf
    s.state[0, at["frozen 0"] :] = torch.arange(7)
    s.w[at["frozen 6"]] = s.basis[:, at["frozen 6"]] = torch.nan
    s.residual_sq[at["frozen 0"] :] = 7.0
    return s


@dtypes
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
def test_each_system_comes_to_its_own_status(target: Target, dtype: torch.dtype) -> None:
    step = cases(dtype)
    done = step.to(target.device)
    done.launch(target.backend)
    done = done.to("cpu")
    assert dict(zip(CASES, done.state_out[0].tolist(), strict=True)) == CASES
    for b, (name, code) in enumerate(CASES.items()):
        frozen = name.startswith("frozen")
        assert done.state_out[1, b] == step.state[1, b] + (code < 0), name
        assert same(done.residual_sq[b], torch.tensor(7.0) if frozen else step.rr[b].sum()), name
        assert (done.rr_out[b].sum() > 0) == (name == "advances"), name
        if frozen:
            written = (done.first[:3, b], done.second[:3, b], done.ww[b])
            assert not any(value.any() for value in written), name
        if code >= 0:
            assert same(done.column[b], step.column[b]) and same(done.left[b], step.left[b]), name
        grown = name == "advances"
        assert same(done.basis[3, b], step.basis[3, b]) != grown, name
        assert same(done.basis[[0, 1, 2, 4], b], step.basis[[0, 1, 2, 4], b]), name


@dtypes
@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize(
    ("batch", "n", "count", "capacity", "parts"), [s for s in SIZES if s[2] > 2]
)
def test_anderson_remembers_as_the_oracle(
    target: Target,
    batch: int,
    n: int,
    count: int,
    capacity: int,
    parts: int,
    slot: int,
    dtype: torch.dtype,
) -> None:
    step = anderson(batch, n, dtype, count, capacity, parts, slot)
    done = step.to(target.device)
    done.launch_dots(target.backend)
    done = done.to("cpu")
    residual = step.image - step.z
    change = residual - step.residual
    assert same(done.residual, residual) and same(done.residuals[slot], change)
    moved, eps = step.z.double() - step.z_before.double(), torch.finfo(dtype).eps
    error = (done.moves[slot].double() - (moved + step.beta * change.double())).abs()
    assert (error <= 3 * eps * (moved.abs() + step.beta * change.double().abs())).all()
    others = [j for j in range(capacity) if j != slot]
    assert same(done.residuals[others], step.residuals[others])
    assert same(done.moves[others], step.moves[others])
    history = done.residuals[:count]
    dots_oracle(history, change, EPS64).check(done.row[:count].sum(-1))
    dots_oracle(history, residual, EPS64).check(done.products[:count].sum(-1))
    own = torch.stack([residual, step.image])
    dots_oracle(own, own, EPS64).check(done.squares.sum(-1))
    assert done.row[count:].isnan().all() and done.products[count:].isnan().all()


@dtypes
@sizes
def test_anderson_mixes_as_the_oracle(
    target: Target,
    batch: int,
    n: int,
    count: int,
    capacity: int,
    parts: int,
    dtype: torch.dtype,
) -> None:
    step = anderson(batch, n, dtype, count, capacity, parts, slot=capacity)
    done = step.to(target.device)
    done.launch_mix(target.backend)
    done = done.to("cpu")
    z, r = step.z.double(), step.residual.double()
    c, eps = step.coefficients[:, :count].T, 2 * torch.finfo(dtype).eps
    oracle = combination_oracle(z + step.beta * r, c, step.moves[:count], eps)
    oracle.bound += 4 * eps * (z.abs() + r.abs())
    oracle.check(done.z_out)
    assert not done.z_out[:, n:].any()


@pytest.mark.parametrize("frozen", [[0, 2, 3], [3], [0, 3]])
def test_a_frozen_sample_stays_where_it_is_and_adds_nothing(
    target: Target, frozen: list[int]
) -> None:
    step = anderson(5, 300, torch.float32)
    runs = [b for b in range(5) if b not in frozen]
    step.state[0, frozen] = torch.tensor([0, 1, 6], dtype=torch.int32)[: len(frozen)]
    for v in (step.image, step.residual, step.residuals, step.moves):
        v[..., 3, :] = torch.nan
    done = step.to(target.device)
    done.launch(target.backend)
    done = done.to("cpu")
    assert torch.equal(done.z_out[frozen], step.z[frozen])
    for sums in (done.row[:3], done.products[:3], done.squares):
        assert not sums[:, frozen].any() and (sums[:, runs] != 0).all()
    alone = step.select(runs).to(target.device)
    alone.launch(target.backend)
    assert_same_bits(alone.to("cpu"), done.select(runs))


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@both
def test_float32_at_any_scale(target: Target, make: Callable[..., History], scale: float) -> None:
    """The dots of vectors scaled by a power of two or so are those of the vectors, scaled."""
    step = make(2, 100, torch.float32)
    moved = step.to(target.device)
    scaled = [moved.w] if isinstance(moved, Arnoldi) else anderson_vectors(moved)
    for vector in scaled:
        vector *= scale
    done, plain = moved, step.to(target.device)
    done.launch(target.backend)
    plain.launch(target.backend)
    pairs = (
        [("column", 1)]
        if isinstance(done, Arnoldi)
        else [("row", 2), ("products", 2), ("squares", 2)]
    )
    eps = torch.finfo(torch.float32).eps
    for name, power in pairs:
        now, before = (getattr(s, name).double().cpu().nan_to_num() for s in (done, plain))
        error = (now / scale**power - before).abs()
        assert (error <= 100 * eps * before.abs().max()).all(), name


def anderson_vectors(step: Anderson) -> list[Tensor]:
    return [step.image, step.z, step.z_before, step.residual, step.residuals, step.moves]


def assert_same_bits(one: History, other: History) -> None:
    theirs = other.tensors()
    for name, value in one.tensors().items():
        assert same(value, theirs[name]), name


@both
def test_a_system_is_the_same_alone_and_in_a_batch(
    triton_target: Target, make: Callable[..., History]
) -> None:
    step = make(3, 2500, torch.float32, parts=2)
    together = step.to(triton_target.device)
    together.launch(triton_target.backend)
    alone = step.select([1]).to(triton_target.device)
    alone.launch(triton_target.backend)
    assert_same_bits(alone.to("cpu"), together.to("cpu").select([1]))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("n", [16, 48, 1008, 2304, 16384, 16400, 70000])
@dtypes
@both
def test_the_references_bits_are_a_systems_own(
    make: Callable[..., History], n: int, count: int, dtype: torch.dtype, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    step = make(7, n, dtype, count)
    if isinstance(step, Anderson):
        step.slot = count - 1
    together = step.to("cpu")
    together.launch(reference)
    for systems in ([0], [3, 5], [1, 2, 3, 4, 5, 6]):
        alone = step.select(systems)
        alone.launch(reference)
        assert_same_bits(alone, together.select(systems))
    torch.set_num_threads(before)


@dtypes
@pytest.mark.parametrize("ending", [False, True])
def test_few_systems_and_many_get_what_the_rules_write(
    dtype: torch.dtype, ending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = cases(dtype) if ending else arnoldi(4, 300, dtype, parts=2)
    one_by_one, ruled = step.to("cpu"), step.to("cpu")
    one_by_one.launch(reference)
    monkeypatch.setattr("tritonimplicit_kernels.reference.few.MOST", 0)
    ruled.launch(reference)
    assert_same_bits(one_by_one, ruled)


@both
def test_off_the_cpu_nothing_is_read_by_the_host(make: Callable[..., History]) -> None:
    step = make(3, 500, torch.float32).to("meta")  # has no numbers: to read one is an error
    step.launch(reference)
    with pytest.raises((RuntimeError, NotImplementedError)):
        step.state.tolist()


@pytest.mark.gpu
@dtypes
@both
def test_a_long_row_beside_the_reference(make: Callable[..., History], dtype: torch.dtype) -> None:
    """Every chunk has several blocks; too long for the interpreter."""
    from tritonimplicit_kernels import backend

    run = backend("triton", "cuda", dtype)
    n = 3 * 10**6 + 5
    step = make(2, n, dtype, parts=run.partial_count(n + 11))
    expected, done = step.to("cpu"), step.to("cuda")
    expected.launch(reference)
    done.launch(run)
    unit = 8 * n**0.5 * torch.finfo(dtype).eps
    theirs = expected.tensors()
    for name, value in done.to("cpu").tensors().items():
        sums = name in ("first", "second", "ww", "row", "products", "squares", "rr_out")
        ours, other = (v.sum(-1) if sums else v for v in (value, theirs[name]))
        scale = other.nan_to_num().abs().max().double().item()
        torch.testing.assert_close(ours, other, rtol=unit, atol=unit * scale, equal_nan=True)


def test_no_systems_are_no_work(target: Target) -> None:
    for make in (arnoldi, anderson):
        step = make(2, 16, F64).select([]).to(target.device)
        step.launch(target.backend)
