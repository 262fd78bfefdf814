"""Roots under every PyTorch transform, against closed forms and unrolled iterations in fp64."""

from typing import ClassVar

import optree
import pytest
import torch
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap

import tritonimplicit as ti
from tritonimplicit.linear_solve import CG, GMRES, Dense

DOUBLE = torch.float64
close = torch.testing.assert_close

# torch.func.jvp itself calls torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

torch.manual_seed(0)
W = 0.4 * torch.randn(6, 6, dtype=DOUBLE) / 6**0.5
U, X0 = torch.randn(6, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
START = torch.zeros(6, dtype=DOUBLE)
MANY = torch.randn(7, 3, dtype=DOUBLE)


def residual(z, w, u, x):
    return z - torch.tanh(w @ z + u @ x)


def iterate(z, w, u, x):
    for _ in range(80):
        z = torch.tanh(w @ z + u @ x)
    return z


class CountedDense(Dense):
    """Notes (systems, unknowns) of each solve."""

    solves: ClassVar[list[tuple[int, int]]] = []

    def _solve_rows(self, matvec, b, layout):
        self.solves.append((layout.systems, layout.n))
        return super()._solve_rows(matvec, b, layout)


@pytest.fixture(autouse=True)
def solves():
    CountedDense.solves.clear()
    return CountedDense.solves


solver = ti.custom_root(residual, argnums=(1, 2, 3), solve=CountedDense())(iterate)


def root(x, w=W):
    return solver(START, w, U, x)


def unrolled(x, w=W):
    return iterate(START, w, U, x)


def loss(x):
    return root(x).pow(3).sum()


def unrolled_loss(x):
    return unrolled(x).pow(3).sum()


def test_every_check_of_gradcheck_but_the_legacy_vmap():
    x, w = X0.clone().requires_grad_(), W.clone().requires_grad_()
    assert gradcheck(root, (x, w), check_forward_ad=True)
    assert gradgradcheck(root, (x, w), check_fwd_over_rev=True, check_rev_over_rev=True)


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "grad of sum of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sin().sum()),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacfwd of hessian": lambda f: jacfwd(hessian(f)),
    "jacrev of hessian": lambda f: jacrev(hessian(f)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_of_a_scalar(transform):
    close(transform(loss)(X0), transform(unrolled_loss)(X0))


@pytest.mark.parametrize(
    "transform", [jacrev, jacfwd, lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacrev(f))]
)
def test_transforms_of_the_root(transform):
    close(transform(root)(X0), transform(unrolled)(X0))


def test_vjp_and_jvp():
    close(vjp(root, X0)[1](START + 1), vjp(unrolled, X0)[1](START + 1))
    close(jvp(root, (X0,), (X0,)), jvp(unrolled, (X0,), (X0,)))


def test_forward_ad_in_a_bare_dual_level():
    def tangent(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(X0, MANY[0]))).tangent

    close(tangent(root), tangent(unrolled))


def test_vmap_is_one_batched_solve(solves):
    close(vmap(root)(MANY), vmap(unrolled)(MANY))
    assert solves == []
    close(vmap(torch.func.grad(loss))(MANY), vmap(torch.func.grad(unrolled_loss))(MANY))
    assert solves == [(7, 6)]
    solves.clear()
    total = torch.func.grad(lambda xs: vmap(loss)(xs).sum())(MANY)
    close(total, vmap(torch.func.grad(unrolled_loss))(MANY))
    assert solves == [(7, 6)]


def test_vmap_with_shared_weights(solves):
    w = W.clone().requires_grad_()

    def shared(f):
        return grad(vmap(f, (0, None))(MANY, w).pow(3).sum(), w)

    close(shared(root), shared(unrolled))
    assert solves == [(7, 6)]

    def per_sample(f):
        return vmap(torch.func.grad(lambda w, x: f(x, w).pow(3).sum()), (None, 0))(W, MANY)

    close(per_sample(root), per_sample(unrolled))


def test_nested_vmaps_and_vmapped_jacobians(solves):
    close(vmap(jacrev(root))(MANY), vmap(jacrev(unrolled))(MANY))
    assert solves == [(7 * 6, 6)]
    close(vmap(jacfwd(root))(MANY), vmap(jacfwd(unrolled))(MANY))
    close(vmap(hessian(loss))(MANY), vmap(hessian(unrolled_loss))(MANY))
    nested = MANY[:6].view(2, 3, 3)
    close(
        vmap(vmap(torch.func.grad(loss)))(nested),
        vmap(vmap(torch.func.grad(unrolled_loss)))(nested),
    )


def test_vmap_over_a_solver_that_has_a_batch_of_its_own():
    """Each system keeps its own scalars: (vmap, batch) are both batch dimensions."""
    scale = torch.rand(5, 1, dtype=DOUBLE) + 0.5
    batched = ti.custom_root(
        lambda z, x: scale * z - x, argnums=1, solve=CG(batch_ndim=1, rtol=1e-12)
    )(lambda _, x: x / scale)
    xs = torch.randn(3, 5, 4, dtype=DOUBLE)
    got = vmap(torch.func.grad(lambda x: batched(None, x).sum()))(xs)
    close(got, (1 / scale).expand(3, 5, 4))


def test_a_foreign_solver_gets_a_vmapped_batch_as_one_system():
    calls = []

    def foreign(matvec, b):
        calls.append(tuple(b[0].shape))
        return Dense()(matvec, b)

    f = ti.custom_root(residual, argnums=3, solve=foreign)(iterate)
    got = vmap(torch.func.grad(lambda x: f(START, W, U, x).pow(3).sum()))(MANY)
    close(got, vmap(torch.func.grad(unrolled_loss))(MANY))
    assert calls == [(7, 6)]


def test_aux_under_vmap():
    f = ti.custom_root(lambda z, x: z - 2 * x, argnums=1, has_aux=True)(
        lambda _, x: (2 * x, {"sum": x.sum(), "name": "n"})
    )
    solution, aux = vmap(lambda x: f(None, x), out_dims=(0, {"sum": 0, "name": None}))(MANY)
    close(solution, 2 * MANY)
    close(aux["sum"], MANY.sum(1))


def test_a_solver_that_looks_at_values_cannot_be_vmapped_and_says_so():
    def stops(z, w, u, x):
        for _ in range(100):
            z, before = torch.tanh(w @ z + u @ x), z
            if (z - before).norm().item() < 1e-15:
                break
        return z

    f = ti.custom_root(residual, argnums=3, solve=Dense())(stops)
    close(torch.func.grad(lambda x: f(START, W, U, x).pow(3).sum())(X0), grad_of_unrolled())
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(lambda x: f(START, W, U, x))(MANY)


def grad_of_unrolled():
    return torch.func.grad(unrolled_loss)(X0)


def test_a_transformed_tensor_in_the_closure_is_an_error():
    def through_a_closure(x):
        f = ti.custom_root(lambda z, w: residual(z, w, U, x), argnums=1, solve=Dense())(
            lambda z, w: iterate(z, w, U, x)
        )
        return f(START, W).sum()

    with pytest.raises(RuntimeError, match="closes over"):
        torch.func.grad(through_a_closure)(X0)


def test_the_old_vmap_of_autograd_is_refused():
    x = X0.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"old vmap .* use torch\.func\.jacrev"):
        grad(root(x), x, torch.eye(6, dtype=DOUBLE), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="old vmap"):
        torch.autograd.functional.jacobian(root, X0, vectorize=True)


def test_an_objective_whose_gradient_is_the_optimality():
    a, y = torch.randn(20, 5, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE)

    def objective(x, lam):
        return (a @ x - y).square().sum() / 2 + lam * x.square().sum() / 2

    def closed(lam):
        return torch.linalg.solve(a.T @ a + lam * torch.eye(5, dtype=DOUBLE), a.T @ y)

    f = ti.custom_root(torch.func.grad(objective), argnums=1, solve=Dense())(
        lambda _, lam: closed(lam)
    )
    lam = torch.tensor(0.7, dtype=DOUBLE)
    for transform in (jacrev, jacfwd, lambda f: jacfwd(jacrev(f))):
        close(transform(lambda lam: f(None, lam))(lam), transform(closed)(lam))
    assert gradgradcheck(lambda lam: f(None, lam), lam.requires_grad_(), check_fwd_over_rev=True)


def test_checkpointing_around_and_inside_the_function():
    x = X0.clone().requires_grad_()
    checkpoint = torch.utils.checkpoint.checkpoint
    (got,) = grad(checkpoint(loss, x, use_reentrant=False), x)
    close(got, grad_of_unrolled())
    inside = ti.custom_root(
        lambda z, x: z - checkpoint(lambda z: torch.tanh(W @ z + U @ x), z, use_reentrant=False),
        argnums=1,
        solve=ti.linear_solve.solve_inv(ns=True, rtol=1e-12, maxiter=200),
    )(lambda z, x: iterate(z, W, U, x))
    (got,) = grad(inside(START, x).pow(3).sum(), x)
    close(got, grad_of_unrolled())


# Dynamo looks at the .grad of what it passes over a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_with_one_graph_break_the_numbers_are_right():
    x = X0.clone().requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager")
    close(grad(compiled(x), x)[0], grad_of_unrolled())


def test_a_preconditioner_of_the_backward_pass_is_not_used_for_the_other_transpose():
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=DOUBLE)
    exact, asked = torch.linalg.inv(matrix), []

    def inverse(r):
        asked.append(r)
        return optree.tree_map(lambda leaf: exact.mT @ leaf, r)

    @ti.custom_root(lambda x, b: matrix @ x - b, argnums=1, solve=GMRES(rtol=1e-14, M=inverse))
    def solver(x, b):
        return torch.linalg.solve(matrix, b)

    def run(b):
        return solver(torch.zeros_like(b), b)

    b = torch.tensor([1.0, -2.0], dtype=DOUBLE, requires_grad=True)
    close(grad(run(b)[0], b)[0], exact[0])
    assert asked
    asked.clear()
    close(jvp(run, (b.detach(),), (b.detach(),))[1], exact @ b.detach())
    assert not asked


def test_a_ridge_for_each_system_is_differentiated_through_a_vmap():
    ridge = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE, requires_grad=True)
    a = torch.rand(5, 3, 4, dtype=DOUBLE, requires_grad=True)  # 5 vmapped, 3 systems
    solver = ti.custom_root(
        lambda x, a: x + x**3 - a, argnums=1, solve=Dense(batch_ndim=1, ridge=ridge)
    )(newton)
    x = vmap(lambda a: solver(torch.zeros_like(a), a))(a)
    (got,) = grad(x.sum(), a, create_graph=True)
    expected = 1 / (1 + 3 * x.detach() ** 2 + ridge[:, None])
    close(got, expected)
    close(grad(got.sum(), ridge), grad(expected.sum(), ridge))


def newton(x, a):
    for _ in range(50):
        x = x - (x + x**3 - a) / (1 + 3 * x**2)
    return x
