"""How often the user's function is evaluated, and what is known of its Jacobian."""

import pytest
import torch
from torch import nn

import tritonimplicit as ti
from tritonimplicit.linear_solve import CG, Dense, NormalCG
from tritonimplicit.operators import Jacobian

DOUBLE = torch.float64
MATRIX = torch.diag(torch.logspace(0, 1, 12, dtype=DOUBLE)) + 0.3


class Counted:
    """0.5 x.A x + sum x^4 / 4 - a.x, counting its evaluations."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, a):
        self.calls += 1
        return 0.5 * x @ MATRIX @ x + 0.25 * x.pow(4).sum() - a @ x


def newton(x, a):
    for _ in range(30):
        hessian = MATRIX + torch.diag(3 * x.square())
        x = x - torch.linalg.solve(hessian, MATRIX @ x + x.pow(3) - a)
    return x


def hypergradient(optimality, solve):
    a = torch.linspace(-1, 1, 12, dtype=DOUBLE).requires_grad_()
    x = ti.custom_root(optimality, argnums=1, solve=solve)(newton)(torch.zeros(12, dtype=DOUBLE), a)
    return torch.autograd.grad(x.sin().sum(), a)[0]


@pytest.fixture
def pushes(monkeypatch):
    """Products A v by a vjp of a vjp."""
    calls, push = [], Jacobian._push
    monkeypatch.setattr(Jacobian, "_push", lambda self, v: calls.append(1) or push(self, v))
    return calls


@pytest.mark.parametrize("solver", [CG, NormalCG])
def test_evaluations_do_not_grow_with_the_iterations(solver):
    counts = []
    for maxiter in (2, 9):
        objective = Counted()
        hypergradient(torch.func.grad(objective), solver(rtol=0.0, maxiter=maxiter))
        counts.append(objective.calls)
    assert counts == [1, 1]


def test_a_general_jacobian_is_evaluated_once_too(pushes):
    calls = []

    def optimality(x, a):
        calls.append(1)
        return MATRIX @ x + x.pow(3) - a

    hypergradient(optimality, NormalCG(rtol=0.0, maxiter=9))
    assert len(calls) == 1 and len(pushes) == 9 + 1  # and one for the right hand side


def test_the_hessian_of_an_objective_is_its_own_transpose(pushes):
    exact = hypergradient(lambda x, a: MATRIX @ x + x.pow(3) - a, Dense())
    pushes.clear()
    got = hypergradient(torch.func.grad(Counted()), NormalCG(rtol=1e-12))
    assert not pushes
    torch.testing.assert_close(got, exact)


def test_so_is_that_of_a_modules_objective(pushes):
    class Inner(ti.nn.ImplicitMetaGradientModule, linear_solve=NormalCG(rtol=1e-12)):
        def __init__(self, a):
            super().__init__()
            self.a = a
            self.x = nn.Parameter(torch.zeros(12, dtype=DOUBLE))

        def objective(self):
            return Counted()(self.x, self.a)

        def solve(self):
            self.x.copy_(newton(torch.zeros(12, dtype=DOUBLE), self.a))
            return self

    a = torch.linspace(-1, 1, 12, dtype=DOUBLE).requires_grad_()
    (got,) = torch.autograd.grad(Inner(a).solve().x.sin().sum(), a)
    assert not pushes
    torch.testing.assert_close(got, hypergradient(torch.func.grad(Counted()), Dense()))


def test_second_derivatives_by_a_symmetric_solver_need_no_forward_products(pushes):
    a = torch.linspace(-1, 1, 12, dtype=DOUBLE).requires_grad_()
    solve = CG(rtol=1e-13)
    root = ti.custom_root(lambda x, a: MATRIX @ x + x.pow(3) - a, argnums=1, solve=solve)
    assert torch.autograd.gradcheck(lambda a: root(newton)(torch.zeros(12, dtype=DOUBLE), a), a)
    assert torch.autograd.gradgradcheck(lambda a: root(newton)(torch.zeros(12, dtype=DOUBLE), a), a)
    assert not pushes
