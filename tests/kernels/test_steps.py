"""One step, and whole solves, on every backend: against float64 oracles and the rules of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.problems import (
    CG,
    DTYPES,
    F64,
    PCG,
    Neumann,
    Step,
    Target,
    cg,
    cg_oracle,
    neumann,
    neumann_oracle,
    pcg,
    randn,
    solve_cg,
    solve_neumann,
)
from tritonimplicit_kernels import status

# n = 4099 is two whole blocks and a tail; with three partial sums a row, a chunk each.
SIZES = [(1, 4099, 1), (1, 4099, 3), (3, 1000, 2), (17, 17, 1), (3, 1, 1)]
SUMS = {"rr_out", "rz_out"}
VECTORS = {"x", "r", "p", "ap", "d", "b", "ax"}


def same(one: Tensor, other: Tensor) -> bool:
    """Compare bits: NaN equals NaN."""
    return torch.equal(one.nan_to_num(12.34), other.nan_to_num(12.34)) and torch.equal(
        one.isnan(), other.isnan()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "count"), SIZES)
@pytest.mark.parametrize("make", [cg, pcg, neumann])
def test_a_step_is_the_oracles(
    target: Target, make: type, batch: int, n: int, count: int, dtype: torch.dtype
) -> None:
    step = make(batch, n, dtype, count)
    done = target.run(step)
    expected = cg_oracle(step) if isinstance(step, CG) else neumann_oracle(step)
    for name, close in expected.items():
        actual = getattr(done, name)
        close.check(actual.sum(1) if name in SUMS else actual)
    code = status.RUNNING_POSITIVE if isinstance(step, CG) else status.RUNNING
    assert done.state_out.tolist() == [[code] * batch, list(range(1, batch + 1))]
    torch.testing.assert_close(done.residual_sq, step.rr.sum(1))
    assert not done.x[:, n:].any()


CG_CASES = {
    "advances": status.RUNNING_POSITIVE,
    "advances with a negative matrix": status.RUNNING_NEGATIVE,
    "has converged": status.CONVERGED,
    "has converged at maxiter": status.CONVERGED,
    "is at maxiter": status.MAX_ITERATIONS,
    "is at maxiter with p.Ap zero": status.MAX_ITERATIONS,
    "NaN residual at maxiter": status.NON_FINITE,
    "infinite residual": status.NON_FINITE,
    "NaN in Ap": status.NON_FINITE,
    "infinity in Ap": status.NON_FINITE,
    "p.Ap zero": status.BREAKDOWN,
    "p.Ap zero by cancellation": status.BREAKDOWN,
    "sign turns to positive": status.INDEFINITE,
    "sign turns to negative": status.INDEFINITE,
    **{f"frozen {code}": code for code in range(7)},
}


def cg_cases(dtype: torch.dtype) -> CG:
    return with_cg_cases(cg(len(CG_CASES), 20, dtype), CG_CASES)


def with_cg_cases(s: CG, cases: dict[str, int]) -> CG:
    dtype = s.x.dtype
    at = {name: b for b, name in enumerate(cases)}
    maxiter = [at[name] for name in cases if "maxiter" in name]
    s.state[1, maxiter] = s.maxiter
    converged = [at[name] for name in cases if "has converged" in name]
    s.threshold[converged] = s.rr[converged].sum(1)
    s.rr[at["NaN residual at maxiter"]] = torch.nan
    s.rr[at["infinite residual"]] = torch.inf
    s.ap[at["NaN in Ap"], 3] = torch.nan
    s.ap[at["infinity in Ap"], 3] = torch.inf
    s.ap[[at["p.Ap zero"], at["is at maxiter with p.Ap zero"]]] = 0
    row = at["p.Ap zero by cancellation"]
    s.p[row], s.ap[row] = 0, 0
    # Relative to |p| |Ap|, p.Ap is half the eps that is too little.
    s.p[row, 0], s.ap[row, :2] = 1, torch.tensor([torch.finfo(dtype).eps / 2, 1])
    s.rr[row] = 1
    s.state[0, at["sign turns to positive"]] = status.RUNNING_NEGATIVE
    s.state[0, at["sign turns to negative"]] = status.RUNNING_POSITIVE
    for name in ("sign turns to negative", "advances with a negative matrix"):
        s.ap[at[name]] *= -1
    s.state[0, at["frozen 0"] :] = torch.arange(7)
    for vector in (s.x, s.r, s.p, s.ap):
        vector[at["frozen 6"]] = torch.nan
    s.residual_sq[at["frozen 0"] :] = 7.0
    return s


PCG_CASES = {
    "r.z zero": status.PRECONDITIONER,
    "r.z negative": status.PRECONDITIONER,
    "r.z negative, converged": status.CONVERGED,
    "r.z negative at maxiter": status.MAX_ITERATIONS,
    "Ap.(d Ap) negative": status.PRECONDITIONER,
    "d zero": status.PRECONDITIONER,
    "NaN in d": status.NON_FINITE,
    "infinite r.z": status.NON_FINITE,
    "NaN r.z": status.NON_FINITE,
    **CG_CASES,
}


def pcg_cases(dtype: torch.dtype) -> PCG:
    s = pcg(len(PCG_CASES), 20, dtype)
    at = {name: b for b, name in enumerate(PCG_CASES)}
    s.rz[at["r.z zero"]] = 0
    s.rz[[at[name] for name in PCG_CASES if "r.z negative" in name]] *= -1
    s.threshold[at["r.z negative, converged"]] = torch.inf
    s.d[at["Ap.(d Ap) negative"]] *= -1
    zero = at["d zero"]
    s.d[zero], s.rz[zero], s.p[zero], s.ap[zero] = 0, 0, 0, 0
    s.d[at["NaN in d"], 3] = torch.nan
    s.rz[at["infinite r.z"]], s.rz[at["NaN r.z"]] = torch.inf, torch.nan
    row = at["p.Ap zero by cancellation"]
    s.d[row], s.rz[row] = 1, 1
    with_cg_cases(s, PCG_CASES)
    s.d[at["frozen 6"]] = torch.nan
    return s


NEUMANN_CASES = {
    "advances": status.RUNNING,
    "has converged": status.CONVERGED,
    "has converged beyond the limit": status.CONVERGED,
    "is beyond the limit": status.DIVERGED,
    "is beyond the limit at maxiter": status.DIVERGED,
    "is at the limit": status.RUNNING,
    "is at maxiter": status.MAX_ITERATIONS,
    "NaN residual at maxiter": status.NON_FINITE,
    "infinite residual": status.NON_FINITE,
    **{f"frozen {code}": code for code in range(7)},
}


def neumann_cases(dtype: torch.dtype) -> Neumann:
    s = neumann(len(NEUMANN_CASES), 20, dtype)
    at = {name: b for b, name in enumerate(NEUMANN_CASES)}
    s.state[1, [at[name] for name in NEUMANN_CASES if "maxiter" in name]] = s.maxiter
    converged = [at[name] for name in NEUMANN_CASES if "has converged" in name]
    s.threshold[converged] = s.rr[converged].sum(1)
    s.limit[[at[name] for name in NEUMANN_CASES if "beyond the limit" in name]] = 0.5
    s.limit[at["is at the limit"]] = s.rr[at["is at the limit"]].sum()
    s.rr[at["NaN residual at maxiter"]] = torch.nan
    s.rr[at["infinite residual"]] = torch.inf
    s.state[0, at["frozen 0"] :] = torch.arange(7)
    for vector in (s.x, s.ax, s.b):
        vector[at["frozen 6"]] = torch.nan
    s.residual_sq[at["frozen 0"] :] = 7.0
    return s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("cases", "codes"),
    [(cg_cases, CG_CASES), (pcg_cases, PCG_CASES), (neumann_cases, NEUMANN_CASES)],
    ids=["cg", "pcg", "neumann"],
)
def test_each_system_comes_to_its_own_status(
    target: Target, cases: type, codes: dict[str, int], dtype: torch.dtype
) -> None:
    step: Step = cases(dtype)
    done = target.run(step)
    sums = SUMS & vars(step).keys()
    assert dict(zip(codes, done.state_out[0].tolist(), strict=True)) == codes
    for b, (name, code) in enumerate(codes.items()):
        frozen = name.startswith("frozen")
        assert done.state_out[1, b] == step.state[1, b] + (code < 0), name
        assert same(done.residual_sq[b], torch.tensor(7.0) if frozen else step.rr[b].sum()), name
        if code < 0:
            alone = target.run(step.select([b]))
            assert all(same(getattr(alone, v)[0], getattr(done, v)[b]) for v in ("x", *sums))
            assert all(getattr(done, v)[b].sum() > 0 for v in sums), name
        else:
            assert not any(getattr(done, v)[b].any() for v in sums), name
            untouched = VECTORS & vars(step).keys()
            assert all(same(getattr(done, v)[b], getattr(step, v)[b]) for v in untouched), name
        if frozen and isinstance(done, CG):
            assert not done.dots[:, b].any(), name


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_float32_dots_neither_underflow_nor_overflow(target: Target, scale: float) -> None:
    step = cg(2, 100, torch.float32)
    for vector in (step.x, step.r, step.p, step.ap):
        vector *= scale
    step.rr *= scale**2
    check_at_scale(target, step)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_float32_dots_with_a_preconditioner_neither_underflow_nor_overflow(
    target: Target, scale: float
) -> None:
    step = pcg(2, 100, torch.float32)  # with a matrix at this scale, and d about its inverse
    for vector in (step.r, step.ap):
        vector *= scale
    step.d /= scale
    step.rr *= scale**2
    step.rz *= scale
    check_at_scale(target, step)


def check_at_scale(target: Target, step: CG) -> None:
    done = target.run(step)
    assert done.state_out[0].tolist() == [status.RUNNING_POSITIVE] * 2
    for name, close in cg_oracle(step).items():
        # Gradual underflow: what falls below the smallest normal number errs by a subnormal's unit.
        close.bound += 2.0**-148 if name not in SUMS else 0
        close.check(getattr(done, name).sum(1) if name in SUMS else getattr(done, name))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (F64, 1e-10)])
@pytest.mark.parametrize("sign", [1, -1])
def test_cg_solves(target: Target, dtype: torch.dtype, rtol: float, sign: int) -> None:
    b = randn(3, 40, dtype, seed=5)
    diagonal = sign * torch.linspace(1, 9, b.shape[1], dtype=dtype).repeat(3, 1)
    diagonal[1] = sign * 3.0  # one step: frozen beside the others
    done = solve_cg(target, diagonal, b, rtol, maxiter=40)
    assert done.state[0].tolist() == [status.CONVERGED] * 3
    assert done.state[1, 1] == 1 < done.state[1, 0] <= 40
    # The smallest eigenvalue's size is 1, so that the error is at most the residual's. The
    # recurrence's residual strays from the true one by about eps a step, times |A| |x| <= 9 |b|.
    drift = done.state[1].max() * 9 * torch.finfo(dtype).eps
    assert ((done.x - b / diagonal).norm(dim=1) <= (rtol + drift) * b.norm(dim=1)).all()
    assert (done.residual_sq <= done.threshold).all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (F64, 1e-10)])
@pytest.mark.parametrize("sign", [1, -1])
def test_preconditioned_cg_solves(
    target: Target, dtype: torch.dtype, rtol: float, sign: int
) -> None:
    b = randn(3, 40, dtype, seed=5)
    diagonal = sign * torch.logspace(0, 6, b.shape[1], dtype=dtype).repeat(3, 1)
    d = diagonal.abs().reciprocal()
    d[[0, 2]] *= torch.linspace(1, 3, b.shape[1], dtype=dtype)
    done = solve_cg(target, diagonal, b, rtol, maxiter=40, d=d)
    assert done.state[0].tolist() == [status.CONVERGED] * 3
    assert done.state[1, 1] == 1 < done.state[1, 0] <= 30  # d is the inverse: frozen at once
    # As without one, of the preconditioned matrix, whose eigenvalues are between 1 and 3.
    drift = done.state[1].max() * 9 * torch.finfo(dtype).eps
    assert ((done.x - b / diagonal).norm(dim=1) <= (rtol + drift) * b.norm(dim=1)).all()
    assert (done.residual_sq <= done.threshold).all()


def test_cg_says_why_it_fails(target: Target) -> None:
    b = torch.ones(3, 16, dtype=F64)
    diagonal = torch.linspace(1, 2, 16, dtype=F64).repeat(3, 1)
    diagonal[0, ::2] *= -1.5  # p.Ap < 0 first, and > 0 later
    diagonal[1, 3] = torch.nan
    done = solve_cg(target, diagonal, b, rtol=1e-12, maxiter=3)
    assert done.state[0].tolist() == [
        status.INDEFINITE,
        status.NON_FINITE,
        status.MAX_ITERATIONS,
    ]
    assert not done.x[1].any()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (F64, 1e-8)])
def test_neumann_solves(target: Target, dtype: torch.dtype, rtol: float) -> None:
    b = randn(3, 40, dtype, seed=5)
    diagonal = torch.linspace(1, 1.5, b.shape[1], dtype=dtype).repeat(3, 1)
    diagonal[1] = -3.0
    done = solve_neumann(target, diagonal, b, alpha=0.8, rtol=rtol, maxiter=40)
    assert done.state[0].tolist() == [status.CONVERGED, status.DIVERGED, status.CONVERGED]
    # b - A x is known when A x is: the x that is returned is a step ahead of the residual.
    error = (done.x - b / diagonal).norm(dim=1)[[0, 2]]
    limit = (rtol + 10 * torch.finfo(dtype).eps) * b.norm(dim=1)[[0, 2]]
    assert (error <= limit).all()


def test_no_systems_are_no_work(target: Target) -> None:
    for step in (cg(2, 16, F64), pcg(2, 16, F64), neumann(2, 16, F64)):
        assert target.run(step.select([])).x.shape == (0, 16)
