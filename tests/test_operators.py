"""Linear maps recorded once."""

import pytest
import torch

from tritonimplicit.operators import Jacobian, transpose

DOUBLE = torch.float64


class Counted:
    """F(x, y) = (tanh(x0 + M x1), c * x1): counts its evaluations."""

    def __init__(self):
        self.calls = 0
        self.m = torch.randn(3, 2, dtype=DOUBLE)

    def __call__(self, x, args):
        self.calls += 1
        return torch.tanh(x[0] + self.m @ x[1]), args[0] * x[1]


@pytest.fixture
def point():
    torch.manual_seed(0)
    x = (torch.randn(3, dtype=DOUBLE), torch.randn(2, dtype=DOUBLE))
    return Counted(), x, (torch.tensor(1.5, dtype=DOUBLE),)


def dense(fn, x, args):
    blocks = torch.autograd.functional.jacobian(lambda *x: fn(x, args), x)
    return torch.cat([torch.cat(row, 1) for row in blocks])


def test_products_with_the_jacobian_and_its_transpose(point):
    fn, x, args = point
    matrix = dense(fn, x, args)
    jacobian = Jacobian(fn, x, args, wrt=(0,))
    v = (torch.randn(3, dtype=DOUBLE), torch.randn(2, dtype=DOUBLE))
    torch.testing.assert_close(torch.cat(jacobian(v)), matrix @ torch.cat(v))
    torch.testing.assert_close(torch.cat(jacobian.T(v)), matrix.T @ torch.cat(v))
    assert jacobian.T.T is jacobian
    torch.testing.assert_close(jacobian.vjp_args(v)[0], v[1] @ x[1])


def test_the_function_is_evaluated_once(point):
    fn, x, args = point
    jacobian = Jacobian(fn, x, args)
    for _ in range(3):
        jacobian.T(jacobian(x))
    assert fn.calls == 1


def test_an_output_that_depends_on_nothing_has_a_zero_row():
    jacobian = Jacobian(lambda x, _: (x[0] * 2, torch.ones(2)), (torch.ones(2), torch.ones(2)))
    v = (torch.ones(2), torch.ones(2))
    assert [t.tolist() for t in jacobian(v)] == [[2, 2], [0, 0]]
    assert [t.tolist() for t in jacobian.T(v)] == [[2, 2], [0, 0]]


def test_the_transpose_of_a_plain_matvec_is_recorded_from_it():
    torch.manual_seed(0)
    matrix, calls = torch.randn(4, 4), []

    def matvec(v):
        calls.append(1)
        return {"a": matrix @ v["a"]}

    rmatvec = transpose(matvec, like={"a": torch.zeros(4)})
    u = torch.randn(4)
    for _ in range(2):
        torch.testing.assert_close(rmatvec({"a": u})["a"], matrix.T @ u)
    assert len(calls) == 1


def test_a_matvec_without_a_transpose_is_an_error():
    with pytest.raises(RuntimeError, match="no transpose"):
        transpose(lambda v: v.detach(), like=torch.zeros(2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_differentiable_in_their_vector(point, transposed):
    """Solvers of others take the transpose of a matvec by torch.func.vjp, or its jacfwd."""
    fn, x, args = point
    jacobian = Jacobian(fn, x, args)
    matrix = dense(fn, x, args)
    matrix, product = (matrix.T, jacobian.T) if transposed else (matrix, jacobian)
    v = (torch.randn(3, dtype=DOUBLE), torch.randn(2, dtype=DOUBLE))
    (back,) = torch.func.vjp(product, v)[1](v)
    torch.testing.assert_close(torch.cat(back), matrix.T @ torch.cat(v))
    _, pushed = torch.func.jvp(product, (x,), (v,))
    torch.testing.assert_close(torch.cat(pushed), matrix @ torch.cat(v))
    many = tuple(torch.stack([t, 2 * t]) for t in v)
    rows = torch.cat(torch.func.vmap(product)(many), 1)
    torch.testing.assert_close(rows, torch.cat(many, 1) @ matrix.T)
    leaf = tuple(t.clone().requires_grad_() for t in v)
    grads = torch.autograd.grad(sum(t.square().sum() for t in product(leaf)), leaf)
    torch.testing.assert_close(torch.cat(grads), 2 * matrix.T @ (matrix @ torch.cat(v)))
