"""MINRES: symmetric systems of every kind, and honesty where they are not."""

import pytest
import scipy.sparse.linalg
import torch

from tritonimplicit import Status
from tritonimplicit.linear_solve import GMRES, MINRES

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def symmetric(eigenvalues):
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=DOUBLE))[0]
    return (q * eigenvalues) @ q.mT


def indefinite(n):
    return symmetric(torch.cat([-torch.linspace(1, 3, n // 2), torch.linspace(1, 4, n - n // 2)]))


@pytest.mark.parametrize("n", [5, 30, 100])
def test_solves_indefinite_systems_in_as_many_iterations_as_gmres(n):
    matrix, b = indefinite(n), torch.randn(n, dtype=DOUBLE)
    solution = MINRES(rtol=1e-8).solve(lambda v: matrix @ v, b)
    gmres = GMRES(rtol=1e-8, restart=n).solve(lambda v: matrix @ v, b)
    assert solution.status == Status.CONVERGED
    # The same minima, but for the orthogonality that Lanczos loses.
    assert 0 <= solution.iterations - gmres.iterations <= 2
    assert (solution.value - torch.linalg.solve(matrix, b)).norm() <= 1e-8 * b.norm()


@pytest.mark.parametrize("k", [1, 2, 5, 17])
def test_the_iterates_are_scipys(k):
    matrix, b = indefinite(40), torch.randn(40, dtype=DOUBLE)
    theirs = scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=1e-15, maxiter=k)[0]
    solution = MINRES(maxiter=k).solve(lambda v: matrix @ v, b)
    assert solution.iterations == k
    torch.testing.assert_close(solution.value, torch.from_numpy(theirs), rtol=1e-9, atol=1e-9)


def test_preconditioned_iterates_are_scipys():
    matrix, b = indefinite(40), torch.randn(40, dtype=DOUBLE)
    m = symmetric(torch.linspace(0.5, 2, 40, dtype=DOUBLE))
    theirs = scipy.sparse.linalg.minres(
        matrix.numpy(), b.numpy(), rtol=1e-15, maxiter=9, M=m.numpy()
    )[0]
    solution = MINRES(maxiter=9, M=lambda v: m @ v).solve(lambda v: matrix @ v, b)
    torch.testing.assert_close(solution.value, torch.from_numpy(theirs), rtol=1e-9, atol=1e-9)
    # The residual's norm comes from a recurrence here, and is the Euclidean one.
    torch.testing.assert_close(solution.residual_norm, (b - matrix @ solution.value).norm())


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_an_incompatible_system_ends_at_its_least_residual(dtype):
    eigenvalues = torch.tensor([2.0, -1, 0.5, 1, -3, 0, 0, 0, 0, 0], dtype=DOUBLE)
    matrix, b = torch.diag(eigenvalues).to(dtype), torch.ones(10, dtype=dtype)
    solution = MINRES().solve(lambda v: matrix @ v, b)
    assert solution.status == Status.BREAKDOWN
    least = 5**0.5
    assert abs(solution.residual_norm - least) <= 1e-5 * least
    outside = (b - matrix @ solution.value).norm()
    assert abs(outside - least) <= 1e-5 * least


def test_a_nonsymmetric_matrix_is_not_called_solved():
    for seed in range(30):
        torch.manual_seed(seed)
        matrix, b = torch.randn(20, 20, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE)
        solution = MINRES().solve(lambda v, m=matrix: m @ v, b)
        assert solution.status != Status.CONVERGED
        assert solution.value.isfinite().all()


def test_an_indefinite_preconditioner_breaks_down():
    b = torch.ones(6)
    for sign in (torch.full((6,), -1.0), torch.tensor([1.0, 1, 1, 1, 1, -1])):
        solution = MINRES(M=lambda v, s=sign: v * s).solve(lambda v: v * torch.arange(1, 7), b)
        assert solution.status == Status.PRECONDITIONER and solution.value.isfinite().all()
