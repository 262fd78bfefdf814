"""An observed solver solves as the solver does, in every derivative, and shows its Solutions."""

import pytest
import torch

import tritonimplicit as ti
from tritonimplicit.linear_solve import CG, GMRES
from tritonimplicit.linear_solve.observed import Observed

DOUBLE = torch.float64


def root(solver):
    @ti.custom_root(lambda x, a: a * x + x**3 - 1, argnums=1, solve=solver)
    def newton(x, a):
        for _ in range(30):
            x = x - (a * x + x**3 - 1) / (a + 3 * x**2)
        return x

    return lambda a: newton(torch.zeros_like(a), a)


@pytest.fixture
def a():
    return torch.linspace(0.5, 2, 6, dtype=DOUBLE).view(2, 3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("solver", [GMRES(rtol=1e-12, batch_ndim=1), CG(rtol=1e-12, batch_ndim=1)])
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, a: torch.func.grad(lambda a: f(a).sum())(a),
        lambda f, a: torch.func.jacrev(f)(a),
        lambda f, a: torch.func.jacfwd(f)(a),
        lambda f, a: torch.func.hessian(lambda a: f(a).sum())(a),
        lambda f, a: torch.autograd.functional.hessian(lambda a: f(a).sum(), a),
    ],
    ids=["grad", "jacrev", "jacfwd", "hessian", "double backward"],
)
def test_derivatives_are_those_of_the_solver(solver, derivative, a):
    seen = []
    got = derivative(root(Observed(solver, seen.append)), a)
    assert torch.equal(got, derivative(root(solver), a))
    assert seen and all(solution.solver == type(solver).__name__ for solution in seen)
    assert all((solution.status == ti.Status.CONVERGED).all() for solution in seen)


def test_a_tensor_ridge_keeps_its_gradient(a):
    def run(wrap):
        ridge = torch.tensor([0.1, 0.2], dtype=DOUBLE, requires_grad=True)
        solver = wrap(GMRES(rtol=1e-12, batch_ndim=1, ridge=ridge))
        x = solver(lambda v: a * v, torch.ones_like(a))
        return torch.autograd.grad(x.sum(), ridge)[0]

    seen = []
    assert torch.equal(run(lambda s: Observed(s, seen.append)), run(lambda s: s))
    assert len(seen) == 2


def test_fields_can_be_overridden(a):
    seen = []
    Observed(GMRES(batch_ndim=1), seen.append)(lambda v: a * v, torch.ones_like(a), maxiter=1)
    assert (seen[0].iterations == 1).all()
