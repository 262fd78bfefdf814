"""Whole solves of small dense systems: against float64, the rules, bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tests.kernels.dense_problems import DenseCG, dense_cg, spd
from tests.kernels.problems import DTYPES, F64, Target
from tests.kernels.test_steps import same
from tritonimplicit_kernels import reference, row_norms, status

SIZES = [1, 5, 16, 17, 33, 64, 100, 128]


def assert_same_bits(one: DenseCG, other: DenseCG) -> None:
    for name in ("solution", "state", "residual_sq"):
        assert same(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (F64, 1e-11)])
@pytest.mark.parametrize("n", SIZES)
def test_a_solve_is_within_its_tolerance_of_the_solution(
    target: Target, n: int, dtype: torch.dtype, rtol: float
) -> None:
    done = dense_cg(3, n, dtype, rtol=rtol).on(target)
    assert done.state[0].tolist() == [status.CONVERGED] * 3
    assert (done.state[1] >= 1).all() and (done.state[1] <= 2 * n + 2).all()
    # |A^-1| is 10. The recurrence is stopped at rtol |b|, and judged there.
    exact = torch.linalg.solve(done.a.double(), done.rhs.double())
    assert ((done.solution - exact).norm(dim=1) <= 10.01 * rtol * done.rhs.norm(dim=1)).all()
    # x is rounded once more where it is scaled back.
    rounding = torch.finfo(dtype).eps * done.solution.double().norm(dim=1) * 2
    true = done.residual_norms()
    assert ((done.residual_sq.sqrt() - true).abs() <= rounding).all()


def test_a_negative_definite_matrix_is_as_good(target: Target) -> None:
    problem = dense_cg(2, 20, F64, rtol=1e-10)
    expected = problem.on(target)
    problem.a.neg_()
    done = problem.on(target)
    assert torch.equal(done.solution, -expected.solution)
    assert torch.equal(done.state, expected.state)


def every_end(dtype: torch.dtype) -> tuple[DenseCG, dict[str, int]]:
    codes = {
        "converges": status.CONVERGED,
        "zero right hand side": status.CONVERGED,
        "zero matrix": status.BREAKDOWN,
        "indefinite": status.INDEFINITE,
        "ill-conditioned": status.STAGNATED,
        "NaN in the matrix": status.NON_FINITE,
        "infinity in the matrix": status.NON_FINITE,
        "NaN in b": status.NON_FINITE,
        "infinity in b": status.NON_FINITE,
        "x overflows": status.NON_FINITE,
    }
    problem = dense_cg(len(codes), 24, dtype)
    at = {name: b for b, name in enumerate(codes)}
    problem.rhs[at["zero right hand side"]] = 0
    problem.a[at["zero matrix"]] = 0
    # p.Ap = 0.5 n, n/2 elements each of 2 and -1; it is negative for another p.
    diagonal = torch.tensor([2.0, -1.0]).repeat(12)
    problem.a[at["indefinite"]] = diagonal.diag()
    problem.rhs[at["indefinite"]] = 1
    row = at["ill-conditioned"]
    problem.a[row] = spd(1, 24, condition=1e5)[0]
    problem.threshold[row] = 0
    problem.a[at["NaN in the matrix"], 3, 4] = torch.nan
    problem.a[at["infinity in the matrix"], 3, 3] = torch.inf
    problem.rhs[at["NaN in b"], 3] = torch.nan
    problem.rhs[at["infinity in b"], 3] = torch.inf
    row, largest = at["x overflows"], torch.finfo(dtype).max
    problem.a[row] = torch.eye(24) * 1e-3
    problem.rhs[row] = largest / 10
    problem.threshold[row] = (1e-4 * row_norms(problem.rhs[row : row + 1])).square()
    return problem, codes


# The interpreter's NumPy tells of 0 * inf, overflow and NaN, which are meant here.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice) enc:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_system_comes_to_its_own_status(target: Target, dtype: torch.dtype) -> None:
    problem, codes = every_end(dtype)
    if dtype is F64:  # whose squares would overflow with x
        problem, codes = problem.select(list(range(len(codes) - 1))), dict(list(codes.items())[:-1])
    done = problem.on(target)
    assert dict(zip(codes, done.state[0].tolist(), strict=True)) == codes
    broken = done.state[0] == status.NON_FINITE
    assert done.solution[broken].isnan().all() and done.solution[~broken].isfinite().all()
    assert not done.solution[1].any() and done.residual_sq[1] == 0 and done.state[1, 1] == 0
    for b in range(len(codes)):
        assert_same_bits(problem.select([b]).on(target), done.select([b]))


@pytest.mark.parametrize("maxiter", [0, 1, 4])
def test_the_limit_ends_a_solve(target: Target, maxiter: int) -> None:
    problem = dense_cg(2, 24, F64, rtol=1e-12)
    problem.maxiter = maxiter
    done = problem.on(target)
    assert done.state.tolist() == [[status.MAX_ITERATIONS] * 2, [maxiter] * 2]
    torch.testing.assert_close(done.residual_sq.sqrt(), done.residual_norms())


@pytest.mark.parametrize(
    ("a", "b"), [(1e-30, 1e-30), (1e-30, 1.0), (1.0, 1e-30), (1.0, 1e30), (1e30, 1.0), (1e30, 1e30)]
)
def test_huge_and_tiny_numbers_in_float32(target: Target, a: float, b: float) -> None:
    problem = dense_cg(2, 24, torch.float32)
    exact = torch.linalg.solve(problem.a.double(), problem.rhs.double()) * (b / a)
    problem.a *= a
    problem.rhs *= b
    problem.threshold *= b**2
    done = problem.on(target)
    assert done.state[0].tolist() == [status.CONVERGED] * 2
    assert ((done.solution - exact).norm(dim=1) <= 1.01e-3 * b / a * 10).all()


def test_rounding_level_is_the_end(target: Target) -> None:
    """With no tolerance at all a system does not run into 0 / 0."""
    problem = dense_cg(4, 6, torch.float32, rtol=0.0)
    done = problem.on(target)
    assert set(done.state[0].tolist()) <= {status.CONVERGED, status.STAGNATED}
    assert (done.state[1] < 40).all()


def test_a_system_is_the_same_alone_in_a_batch_and_again(target: Target) -> None:
    problem = dense_cg(70, 64, torch.float32)  # more than a group of the reference's
    together = problem.on(target)
    for systems in ([0], [69], [3, 4, 65]):
        assert_same_bits(problem.select(systems).on(target), together.select(systems))
    assert_same_bits(problem.on(target), together)


def test_no_systems_are_no_work(target: Target) -> None:
    assert dense_cg(2, 16, F64).select([]).on(target).solution.shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_the_kernel_takes_the_references_iterations(
    triton_target: Target, n: int, dtype: torch.dtype
) -> None:
    problem = dense_cg(3, n, dtype)
    done, expected = problem.on(triton_target), problem.on(Target(reference, "cpu"))
    # Sums are added up in another order: rounding may move the stop by an iteration.
    assert (done.state[1] - expected.state[1]).abs().max() <= 1
    difference = (done.solution.double() - expected.solution).norm(dim=1)
    assert (difference <= 10.01 * 2e-4 * problem.rhs.norm(dim=1)).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_programs_does_not_matter(seed: int) -> None:
    from tests.kernels.test_triton import shuffled_programs

    target = Target(kernels.backend("triton", "cpu", torch.float32), "cpu")
    problem = dense_cg(6, 20, torch.float32)
    with shuffled_programs(seed):
        shuffled = problem.on(target)
    assert_same_bits(shuffled, problem.on(target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(2, 129, 129)}, r"n from 1 to 128, not \(2, 129, 129\)"),
        ({"a": torch.ones(2, 0, 0)}, r"a must be \(B, n, n\)"),
        ({"a": torch.ones(40, 40)}, r"a must be \(B, n, n\)"),
        ({"a": torch.ones(2, 40, 39)}, r"a must be \(B, n, n\), here \(2, 40, 40\)"),
        ({"rhs": torch.ones(2, 39)}, r"rhs must be \(B, n\), here \(2, 40\), not \(2, 39\)"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.dense_cg(**vars(dense_cg(2, 40, torch.float32)) | change)


def test_off_the_cpu_nothing_is_read_by_the_host() -> None:
    given = {
        k: v.to("meta") if isinstance(v, Tensor) else v
        for k, v in vars(dense_cg(2, 8, F64)).items()
    }
    reference.dense_cg(**given | {"maxiter": 3})


def test_a_solve_compiles_in_one_graph() -> None:
    problem = dense_cg(3, 24, torch.float32)
    expected = problem.on(Target(reference, "cpu"))
    compiled = torch.compile(kernels.dense_cg, backend="aot_eager", fullgraph=True)
    compiled(**vars(problem))
    assert_same_bits(problem, expected)
