"""`Auto` looks at the operator, picks, and says what it picked."""

import pytest
import torch

import tritonimplicit as ti
from tritonimplicit import LinearOperator, Status
from tritonimplicit.linear_solve import Auto, Jacobi, solve_auto

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def matrices(n, batch=(), shift=3.0):
    """A general matrix, a symmetric indefinite one, and a symmetric positive definite one."""
    a = torch.randn(*batch, n, n, dtype=DOUBLE) / n**0.5
    symmetric = (a + a.mT) / 2 + torch.diag(torch.linspace(-2, 2, n, dtype=DOUBLE).sign() * shift)
    return a + shift * torch.eye(n, dtype=DOUBLE), symmetric, a @ a.mT + torch.eye(n, dtype=DOUBLE)


def bmv(v, a):
    return torch.einsum("...ij,...j->...i", a, v)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_what_it_picks_for_a_plain_function(dtype):
    b = torch.randn(50, dtype=dtype)
    for matrix, name in zip(matrices(50), ("GMRES", "MINRES", "MINRES"), strict=True):
        matrix = matrix.to(dtype)
        solution = Auto(rtol=1e-5).solve(lambda v, a=matrix: bmv(v, a), b)
        assert solution.solver == name and solution.status == Status.CONVERGED
        assert (matrix @ solution.value - b).norm() <= 1.1e-5 * b.norm()


def test_it_takes_an_operators_word_and_asks_nothing():
    general, symmetric, definite = matrices(50)
    b, calls = torch.randn(50, dtype=DOUBLE), []

    def counted(v, a):
        calls.append(1)
        return bmv(v, a)

    for operator, name, extra in (
        # One product more, for the true residual; two to look at an operator that says nothing.
        (LinearOperator(counted, definite, positive_definite=True), "CG", 1),
        (LinearOperator(counted, symmetric, symmetric=True), "MINRES", 1),
        (LinearOperator(counted, general), "GMRES", 3),
    ):
        calls.clear()
        solution = Auto(rtol=1e-6).solve(operator, b)
        assert solution.solver == name
        assert name != "GMRES" or solution.iterations < 20  # no restart
        assert len(calls) == solution.iterations + extra


def test_small_systems_are_dense():
    b = torch.randn(3, 32, dtype=DOUBLE)
    general, _, definite = matrices(32, (3,))
    solution = Auto(batch_ndim=1).solve(lambda v: bmv(v, general), b)
    assert solution.solver == "Dense" and (solution.status == Status.CONVERGED).all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(general, b))
    told = LinearOperator(bmv, definite, positive_definite=True)
    torch.testing.assert_close(
        Auto(batch_ndim=1).solve(told, b).value, torch.linalg.solve(definite, b)
    )
    wrong = LinearOperator(bmv, -definite, positive_definite=True)
    assert (Auto(batch_ndim=1).solve(wrong, b).status == Status.INDEFINITE).all()


def test_a_dense_solve_is_held_to_the_tolerance_that_was_asked_for():
    hilbert = 1 / (torch.arange(12.0)[:, None] + torch.arange(12.0) + 1)
    solution = Auto(rtol=0.0).solve(lambda v: hilbert @ v, torch.ones(12))
    relative = (hilbert.double() @ solution.value.double() - 1).norm() / 12**0.5
    assert relative > torch.finfo(torch.float32).eps and solution.status == Status.STAGNATED


def test_one_system_that_is_not_symmetric_decides():
    general, symmetric, _ = matrices(40)
    matrix = torch.stack([symmetric, general])
    solution = Auto(batch_ndim=1).solve(lambda v: bmv(v, matrix), torch.randn(2, 40, dtype=DOUBLE))
    assert solution.solver == "GMRES" and (solution.status == Status.CONVERGED).all()


def test_a_hessian_is_known_to_be_symmetric():
    _, symmetric, _ = matrices(40)
    theta = torch.randn(40, dtype=DOUBLE, requires_grad=True)
    objective = lambda x, t: 0.5 * x @ symmetric @ x - t @ x  # noqa: E731
    root = ti.custom_root(torch.func.grad(objective), argnums=1, solve=solve_auto(rtol=1e-12))
    x = root(lambda _, t: torch.linalg.solve(symmetric, t))(torch.zeros(40, dtype=DOUBLE), theta)
    with ti.record_solves() as log:
        x.sum().backward()
    assert log[0].solver == "MINRES"
    ones = torch.ones(40, dtype=DOUBLE)
    torch.testing.assert_close(theta.grad, torch.linalg.solve(symmetric, ones))


def test_fields_go_to_the_method():
    _, _, definite = matrices(60)
    operator = LinearOperator(bmv, definite, positive_definite=True)
    b = torch.randn(60, dtype=DOUBLE)
    exact = torch.linalg.solve(definite + 0.5 * torch.eye(60, dtype=DOUBLE), b)
    solver = Auto(ridge=0.5, rtol=1e-10, M=Jacobi(), init=exact)
    solution = solver.solve(operator, b)
    assert solution.solver == "CG" and solution.iterations <= 1
    torch.testing.assert_close(solution.value, exact)


def test_nan_is_told_whatever_is_picked():
    matrix = torch.full((40, 40), torch.nan)
    solution = Auto().solve(lambda v: matrix @ v, torch.ones(40))
    assert solution.status == Status.NON_FINITE and solution.value.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_coarse_dtype_does_not_make_a_matrix_symmetric(dtype):
    matrix = (torch.eye(512) + 0.9 * torch.randn(512, 512) / 512**0.5).to(dtype)
    solver = Auto(rtol=5e-2, on_failure="ignore")
    assert solver.solve(lambda v: matrix @ v, torch.randn(512).to(dtype)).solver == "GMRES"


def test_a_dense_solve_is_held_to_an_absolute_tolerance_too():
    scale = torch.logspace(0, 3, 20)
    solution = Auto(rtol=0.0, atol=1e-2).solve(lambda v: scale * v, torch.ones(20))
    assert solution.solver == "Dense" and solution.status == Status.CONVERGED
