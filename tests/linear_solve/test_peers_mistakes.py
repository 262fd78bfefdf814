"""Mistakes that other libraries' solvers make, and that ours must not."""

import pytest
import torch

import tritonimplicit as ti
from tritonimplicit import Status
from tritonimplicit.linear_solve import CG, Neumann, NormalCG, solve_inv

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def spectrum(n, decades):
    return torch.logspace(0, -decades, n, dtype=DOUBLE)


@pytest.mark.parametrize("solver", [CG(maxiter=1), NormalCG(maxiter=1)], ids=str)
def test_the_last_iterate_is_returned_and_not_the_one_before(solver):
    """hypertorch's CG returns the one before: zero for A = I, which one iteration solves."""
    b = torch.randn(5, dtype=DOUBLE)
    solution = solver.solve(lambda v: v, b)
    torch.testing.assert_close(solution.value, b)
    assert solution.status == Status.CONVERGED


def test_a_hard_system_is_not_called_converged_for_the_sake_of_99_easy_ones():
    """linear_operator stops on the mean of the residuals."""
    scale = torch.ones(100, 200, dtype=DOUBLE)
    scale[7] = spectrum(200, 4)
    b = torch.randn(100, 200, dtype=DOUBLE)
    b_norm = b.norm(dim=1)
    few = CG(rtol=5e-2, batch_ndim=1, maxiter=2).solve(lambda v: scale * v, b)
    assert (few.residual_norm / b_norm).mean() <= 5e-2  # where a mean would stop
    assert few.status[7] == Status.MAX_ITERATIONS
    assert few.residual_norm[7] > b_norm[7]
    all_of_them = CG(rtol=5e-2, batch_ndim=1).solve(lambda v: scale * v, b)
    assert (all_of_them.status == Status.CONVERGED).all()
    assert all_of_them.iterations[7] > 2
    assert ((b - scale * all_of_them.value).norm(dim=1) <= 5e-2 * b_norm * (1 + 1e-12)).all()


@pytest.mark.parametrize("maxiter", range(1, 9))
def test_the_residual_is_that_of_the_iterate_at_every_iteration(maxiter):
    """Betty's CG scales the step of x and not that of the residual: they drift apart at once."""
    scale, b = spectrum(30, 3), torch.randn(30, dtype=DOUBLE)
    for factor in (1e-3, 1.0, 50.0):
        matrix = factor * scale
        solution = CG(rtol=1e-12, maxiter=maxiter).solve(lambda v, a=matrix: a * v, b)
        residual = (b - matrix * solution.value).norm()
        # The recurrence and the product round differently: a few n eps ‖b‖ in so few iterations.
        assert abs(solution.residual_norm - residual) <= 1e-12 * b.norm()


def test_a_system_that_overflows_leaves_the_rest_of_its_batch_alone():
    """torchdeq masks by multiplying with zero: 0 * inf makes NaN of every sample."""
    scale = torch.tensor([0.5, 1e200, 1.2], dtype=DOUBLE)[:, None]
    b = torch.randn(3, 20, dtype=DOUBLE)
    solver = Neumann(rtol=1e-10, maxiter=200, batch_ndim=1)
    solution = solver.solve(lambda v: scale * v, b)
    assert solution.status[1] in (Status.DIVERGED, Status.NON_FINITE)
    rest = [0, 2]
    alone = solver.solve(lambda v: scale[rest] * v, b[rest])
    assert (alone.status == Status.CONVERGED).all()
    assert torch.equal(solution.value[rest], alone.value)


def test_a_diverging_sample_leaves_the_gradients_of_the_others_alone():
    slope = torch.tensor([0.5, 3.0, -0.3], dtype=DOUBLE)[:, None]  # |slope| > 1: no contraction
    x = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)
    solve = solve_inv(ns=True, rtol=1e-12, maxiter=2000, batch_ndim=1)

    @ti.custom_fixed_point(lambda z, x: slope * z + x, argnums=1, solve=solve)
    def fixed_point(z, x):
        return x / (1 - slope)

    with pytest.warns(ti.ConvergenceWarning, match="some of 3 systems diverged"):
        fixed_point(torch.zeros_like(x), x).sum().backward()
    expected = (1 / (1 - slope)).expand(3, 4)
    torch.testing.assert_close(x.grad[[0, 2]], expected[[0, 2]], rtol=1e-11, atol=0)
    assert not (x.grad[1].abs() < 1e3).any()  # no zero in the place of what was not found
