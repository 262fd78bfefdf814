"""SHINE: the inverse that Broyden's method leaves behind, as an answer and as a preconditioner."""

import dataclasses
import math

import optree
import pytest
import torch
from torch import nn

from tritonimplicit import Status
from tritonimplicit.fixed_point import Anderson, Broyden
from tritonimplicit.linear_solve import CG, GMRES, Neumann
from tritonimplicit.nn import DEQ, JFB, SHINE, Implicit

DOUBLE = torch.float64
BROYDEN = Broyden(batch_ndim=1, rtol=1e-12, maxiter=100, memory=100)


class Cell(nn.Module):
    def __init__(self, n=12):
        super().__init__()
        self.w, self.u = nn.Linear(n, n, bias=False), nn.Linear(n, n)

    def forward(self, z, x):
        return torch.tanh(1.3 * self.w(z) + self.u(x))


def problem():
    torch.manual_seed(0)
    return Cell().to(DOUBLE), torch.randn(4, 12, dtype=DOUBLE)


def gradient(way, solver=BROYDEN):
    cell, x = problem()
    deq = DEQ(cell, solver=solver, gradient=way)
    z = deq(x)
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
    grads = torch.autograd.grad((weight * z).sum(), list(cell.parameters()))
    return torch.cat([g.flatten() for g in grads]), deq.last.backward


def test_one_unknown_is_inverted_exactly():
    # The secant of a linear map is its slope.
    a = torch.tensor([[0.5], [-3.0], [2.0]], dtype=DOUBLE, requires_grad=True)
    deq = DEQ(lambda z, a: a * z + 1, solver=BROYDEN, gradient=SHINE())
    z = deq(a)
    (got,) = torch.autograd.grad(z.sum(), a)
    torch.testing.assert_close(z, 1 / (1 - a))
    torch.testing.assert_close(got, (1 - a) ** -2)
    assert (deq.last.backward.residual_norm <= 1e-14).all()


def test_its_answer_is_nearer_than_jfbs_and_tells_its_residual():
    exact, _ = gradient(Implicit(GMRES(batch_ndim=1, rtol=1e-13)))
    shine, told = gradient(SHINE())
    jfb, _ = gradient(JFB())
    assert (shine - exact).norm() < (jfb - exact).norm()
    assert told.solver == "Neumann" and (told.iterations == 0).all()
    assert (told.residual_norm > 1e-6).all()


def test_one_step_of_gmres_brings_the_answer_to_the_length_of_least_residual():
    ways = SHINE(), SHINE(GMRES(batch_ndim=1, maxiter=1))
    found = {told.solver: told for told in (gradient(way)[1] for way in ways)}
    assert (found["GMRES"].residual_norm < found["Neumann"].residual_norm).all()
    shine, gmres = (optree.tree_leaves(found[name].value)[0] for name in ("Neumann", "GMRES"))
    ratio = (shine * gmres).sum(1) / shine.square().sum(1)
    torch.testing.assert_close(gmres, ratio[:, None] * shine, rtol=1e-10, atol=1e-10)


def test_as_a_preconditioner_it_saves_vjps_and_the_gradient_is_exact():
    exact, plain = gradient(Implicit(GMRES(batch_ndim=1, rtol=1e-3)))
    exact, _ = gradient(Implicit(GMRES(batch_ndim=1, rtol=1e-13)))
    got, told = gradient(SHINE(GMRES(batch_ndim=1, rtol=1e-13)))
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
    _, told = gradient(SHINE(GMRES(batch_ndim=1, rtol=1e-3)))
    assert (told.status == Status.CONVERGED).all()
    assert told.iterations.sum() < plain.iterations.sum()


@pytest.mark.parametrize("update", ["good", "bad"])
def test_the_inverse_is_that_of_the_textbook(update):
    """Broyden's updates of a dense H, from the iterates."""
    cell, x = problem()
    x, seen = x[:1], []
    # Differences of iterates far above rounding: eps ‖z‖ / ‖y‖ is below 1e-9.
    solver = dataclasses.replace(BROYDEN, update=update, rtol=1e-5)
    _, inverse = solver.solve_with_inverse(
        lambda z: (seen.append(z.clone()), cell(z, x))[1], torch.zeros_like(x)
    )
    points = torch.cat(seen)
    residuals = (cell(points, x) - points).detach()
    h = -torch.eye(12, dtype=DOUBLE)
    for k in range(len(points) - 2):  # the last step is not learnt from
        s, y = points[k + 1] - points[k], residuals[k + 1] - residuals[k]
        right = s @ h if update == "good" else y
        h = h + torch.outer(s - h @ y, right) / (right @ y)
    columns = torch.cat([inverse(e[None]) for e in torch.eye(12, dtype=DOUBLE)]).T
    torch.testing.assert_close(columns, -h, rtol=1e-8, atol=1e-8)


def test_the_transpose_of_the_inverse():
    cell, x = problem()
    _, inverse = BROYDEN.solve_with_inverse(lambda z: cell(z, x), torch.zeros_like(x))
    u, v = torch.randn(2, 4, 12, dtype=DOUBLE)
    torch.testing.assert_close((u * inverse(v)).sum(1), (inverse.T(u) * v).sum(1))


def test_several_scales_and_half_precision():
    def f(z, x):
        return {"a": 0.5 * z["a"].sin() + x, "b": (0.3 * z["b"][0] + z["a"].sum(1, keepdim=True),)}

    x = torch.rand(3, 2, dtype=torch.bfloat16, requires_grad=True)
    z0 = {"a": torch.zeros_like(x), "b": (torch.zeros(3, 1, dtype=torch.bfloat16),)}
    solver = Broyden(batch_ndim=1, rtol=2e-2, memory=50)
    deq = DEQ(f, solver=solver, gradient=SHINE(GMRES(batch_ndim=1, rtol=2e-2)))
    z = deq(x, z0=z0)
    z["b"][0].sum().backward()
    right = 1 / (0.7 * (1 - 0.5 * z["a"].detach().double().cos()))
    # Residuals of 2e-2 on both ways, and the roundings, 2^-9, of a few operations.
    torch.testing.assert_close(x.grad.double(), right, rtol=0.1, atol=0)


def test_a_sample_that_diverges_has_no_inverse_and_does_not_touch_the_others():
    def f(z, x):
        image = 0.5 * z.sin() + x
        return torch.where(x > 5, (z + 9).square().exp(), image)

    solver = Broyden(batch_ndim=1, rtol=1e-10, on_failure="ignore")
    x = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 1.0]], dtype=DOUBLE)
    solution, inverse = solver.solve_with_inverse(lambda z: f(z, x), torch.zeros_like(x))
    assert solution.status.tolist() == [0, Status.DIVERGED, 0]
    v = torch.ones_like(x)
    assert torch.equal(inverse(v)[1], v[1]) and inverse(v).isfinite().all()
    others = x[[0, 2]]
    _, alone = solver.solve_with_inverse(lambda z: f(z, others), torch.zeros_like(others))
    torch.testing.assert_close(inverse(v)[[0, 2]], alone(v[:2]), rtol=1e-12, atol=1e-12)
    assert math.isnan(float(f(torch.full((1, 2), math.nan), others[:1])[0, 0]))


def test_an_exact_start_has_no_inverse():
    deq = DEQ(lambda z, x: 0.5 * z + x, solver=BROYDEN, gradient=SHINE())
    x = torch.ones(2, 3, dtype=DOUBLE, requires_grad=True)
    deq(x, z0=2 * x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # as JFB's
    assert (deq.last.backward.residual_norm > 0).all()


def second_derivative(deq, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(deq(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


def forward_mode(deq, x):
    return torch.func.jvp(deq, (x,), (torch.ones_like(x),))[1]


other_transposes = pytest.mark.parametrize("derivative", [second_derivative, forward_mode])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@other_transposes
@pytest.mark.parametrize(
    "way", [SHINE(), SHINE(GMRES(batch_ndim=1, maxiter=1)), SHINE(Neumann(batch_ndim=1))]
)
def test_the_inverse_is_not_taken_for_its_transpose(derivative, way):
    cell, x = problem()
    with pytest.raises(RuntimeError, match=r"SHINE\(GMRES\(batch_ndim=1, rtol=1e-3\)\)"):
        derivative(DEQ(cell, solver=BROYDEN, gradient=way), x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@other_transposes
def test_with_a_tolerance_every_derivative_is_exact(derivative):
    cell, x = problem()
    solve = GMRES(batch_ndim=1, rtol=1e-13)
    got, exact = (
        derivative(DEQ(cell, solver=BROYDEN, gradient=way), x)
        for way in (SHINE(solve), Implicit(solve))
    )
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SHINE(lambda matvec, b: b), TypeError, "an iterative solver"),
        (lambda: SHINE(CG()), TypeError, "nonsymmetric"),
        (lambda: SHINE(Neumann(M=lambda r: r)), ValueError, "has an M already"),
        (
            lambda: DEQ(torch.add, solver=Anderson(), gradient=SHINE())(torch.ones(2)),
            TypeError,
            "solver=Broyden",
        ),
    ],
)
def test_misuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
