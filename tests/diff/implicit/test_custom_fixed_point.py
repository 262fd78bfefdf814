"""Gradients of fixed points."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from tritonimplicit import custom_fixed_point
from tritonimplicit.linear_solve import Dense, solve_inv

DOUBLE = torch.float64


def cell(z, w, x, *, gain=0.5):
    return gain * torch.tanh(z @ w + x)


def iterate(z, w, x, *, gain=0.5):
    for _ in range(80):
        z = cell(z, w, x, gain=gain)
    return z


@pytest.fixture
def point():
    torch.manual_seed(0)
    w = (torch.randn(4, 4, dtype=DOUBLE) / 4).requires_grad_()
    return torch.zeros(3, 4, dtype=DOUBLE), w, torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)


@pytest.mark.parametrize(
    "solve",
    [
        solve_inv(ns=True, rtol=1e-13, maxiter=200, batch_ndim=1),
        solve_inv(),
        solve_inv(batch_ndim=1),
    ],
    ids=["neumann", "dense", "dense, batched"],
)
def test_the_gradient_is_that_of_the_unrolled_iteration(point, solve):
    start, w, x = point
    solver = custom_fixed_point(cell, argnums=(1, 2), solve=solve)(iterate)
    got = grad(solver(start, w, x, gain=0.7).square().sum(), (w, x))
    expected = grad(iterate(start, w, x, gain=0.7).square().sum(), (w, x))
    torch.testing.assert_close(got, expected)


def test_second_order(point):
    start, w, x = point
    solver = custom_fixed_point(cell, argnums=(1, 2), solve=Dense())(iterate)
    assert gradcheck(lambda w, x: solver(start, w, x), (w, x))
    assert gradgradcheck(lambda w, x: solver(start, w, x), (w, x))


def test_pytrees_and_aux():
    def fn(z, p):
        return {"a": (0.5 * z["a"][0] + p,), "b": None}

    @custom_fixed_point(fn, argnums=1, has_aux=True)
    def solver(init, p):
        return {"a": (2 * p,), "b": None}, "aux"

    p = torch.ones(3, requires_grad=True)
    solution, aux = solver(None, p)
    torch.testing.assert_close(grad(solution["a"][0].sum(), p)[0], torch.full((3,), 2.0))
    assert aux == "aux" and solution["b"] is None


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda z, x: (x,), TypeError, "structure"),
        (lambda z, x: x.sum(), ValueError, r"returned \(\) for a solution of shape \(2,\)"),
        (lambda z, x: 1.0, ValueError, "returned float"),
    ],
)
def test_a_function_that_does_not_return_what_the_solution_is(fn, error, message):
    x = torch.ones(2, requires_grad=True)
    solution = custom_fixed_point(fn, argnums=1)(lambda _, x: x + 0)(None, x)
    with pytest.raises(error, match=message):
        solution.sum().backward()


def test_a_function_that_autograd_does_not_record():
    x = torch.ones(2, requires_grad=True)
    fn = torch.no_grad()(lambda z, x: 0.5 * z + x)
    solution = custom_fixed_point(fn, argnums=1)(lambda _, x: 2 * x)(None, x)
    with pytest.raises(RuntimeError, match="depends on none of its arguments through autograd"):
        solution.sum().backward()
