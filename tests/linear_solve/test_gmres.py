"""GMRES: the least residual in the Krylov space, restarts, invariant spaces."""

import pytest
import scipy.sparse.linalg
import torch

from tritonimplicit import Status
from tritonimplicit.linear_solve import GMRES

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nonsymmetric(n):
    """I + a random matrix with eigenvalues in a disc of radius about 1/2."""
    return torch.eye(n, dtype=DOUBLE) + 0.5 * torch.randn(n, n, dtype=DOUBLE) / n**0.5


@pytest.mark.parametrize("restart", [1, 3, 5, 20, 40])
@pytest.mark.parametrize("n", [5, 30, 100])
def test_as_many_iterations_as_scipy(n, restart):
    matrix, b = nonsymmetric(n), torch.randn(n, dtype=DOUBLE)
    norms = []
    scipy.sparse.linalg.gmres(
        matrix.numpy(),
        b.numpy(),
        rtol=1e-8,
        restart=restart,
        maxiter=1000,
        callback=norms.append,
        callback_type="pr_norm",
    )
    solution = GMRES(rtol=1e-8, restart=restart, maxiter=1000).solve(lambda v: matrix @ v, b)
    assert solution.status == Status.CONVERGED and solution.iterations == len(norms)
    error = (solution.value - torch.linalg.solve(matrix, b)).norm()
    assert error <= 1e-8 * b.norm() * torch.linalg.inv(matrix).norm(2)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_the_residual_is_least_in_the_krylov_space(k, dtype):
    matrix, b = torch.randn(3, 10, 10, dtype=DOUBLE), torch.randn(3, 10, dtype=DOUBLE)
    krylov = [b / b.norm(dim=1, keepdim=True)]
    for _ in range(k - 1):
        krylov.append((matrix @ krylov[-1][..., None])[..., 0])
        krylov[-1] /= krylov[-1].norm(dim=1, keepdim=True)
    space = torch.linalg.qr(torch.stack(krylov, 2))[0]
    y = torch.linalg.lstsq(matrix @ space, b[..., None])[0]
    least = (b - (matrix @ space @ y)[..., 0]).norm(dim=1)
    low, rhs = matrix.to(dtype), b.to(dtype)
    solution = GMRES(maxiter=k, batch_ndim=1).solve(lambda v: (low @ v[..., None])[..., 0], rhs)
    assert (solution.iterations == k).all()
    # The Krylov basis above is by powers, of condition up to 1e4 or so.
    slack = 1e-10 if dtype is DOUBLE else 1e-4
    assert ((solution.residual_norm - least).abs() <= slack * b.norm(dim=1)).all()
    outside = (b - (matrix @ solution.value.double()[..., None])[..., 0]).norm(dim=1)
    assert ((outside - least).abs() <= slack * b.norm(dim=1)).all()


def shift(v):
    """The cyclic shift: no Krylov space short of the whole holds anything of the solution."""
    return v.roll(1, -1)


def test_a_cycle_without_progress_ends_as_stagnated():
    b = torch.zeros(30)
    b[0] = 1.0
    short = GMRES(restart=10).solve(shift, b)
    assert short.status == Status.STAGNATED and short.iterations == 10
    assert short.value.tolist() == [0] * 30 and short.residual_norm == 1
    whole = GMRES(restart=30).solve(shift, b)
    assert whole.status == Status.CONVERGED and whole.iterations == 30
    assert torch.equal(whole.value.round(), shift(b).roll(-2, -1))


def test_a_neighbour_that_stagnates_does_not_end_the_others():
    b = torch.zeros(2, 30, dtype=DOUBLE)
    b[:, 0] = 1.0
    b[1] = torch.linspace(1, 2, 30, dtype=DOUBLE)
    scale = torch.linspace(1, 30, 30, dtype=DOUBLE)

    def matvec(v):
        return torch.stack([shift(v[0]), scale * v[1]])

    solver = GMRES(restart=10, rtol=1e-8)
    together = GMRES(restart=10, rtol=1e-8, batch_ndim=1).solve(matvec, b)
    alone = solver.solve(lambda v: scale * v, b[1])
    assert together.status.tolist() == [Status.STAGNATED, Status.CONVERGED]
    assert torch.equal(together.value[1], alone.value)
    assert together.iterations.tolist() == [10, alone.iterations]


def test_a_singular_matrix_breaks_down_with_the_last_good_iterate():
    nilpotent = torch.diag(torch.ones(3, dtype=DOUBLE), -1)
    b = torch.tensor([1.0, 0, 0, 0], dtype=DOUBLE)
    solution = GMRES().solve(lambda v: nilpotent @ v, b)
    assert solution.status == Status.BREAKDOWN
    assert solution.value.tolist() == [0] * 4 and solution.residual_norm == 1


def test_an_invariant_space_is_the_end():
    matrix = torch.block_diag(nonsymmetric(3), nonsymmetric(20))
    b = torch.cat([torch.randn(3, dtype=DOUBLE), torch.zeros(20, dtype=DOUBLE)])
    solution = GMRES(rtol=1e-13).solve(lambda v: matrix @ v, b)
    assert solution.status == Status.CONVERGED and solution.iterations == 3
    assert (solution.value[3:] == 0).all()


@pytest.mark.parametrize(("maxiter", "cycles"), [(9, 1), (10, 1), (11, 2), (25, 3)])
def test_a_restart_costs_one_matvec(maxiter, cycles):
    scale, calls = torch.logspace(0, 6, 100, dtype=DOUBLE), []

    def matvec(v):
        calls.append(1)
        return scale * v

    solution = GMRES(restart=10, maxiter=maxiter).solve(matvec, torch.ones(100, dtype=DOUBLE))
    assert solution.status == Status.MAX_ITERATIONS and solution.iterations == maxiter
    assert len(calls) == maxiter + cycles - 1


def test_restart_is_checked():
    with pytest.raises(ValueError, match="at least 1"):
        GMRES(restart=0)
    with pytest.raises(TypeError, match="restart must be an int"):
        GMRES(restart=2.5)
