"""The gradients a DEQ can have, each against autograd or a closed form in float64."""

import pytest
import torch
from torch import nn

from tritonimplicit import ConvergenceWarning, Status
from tritonimplicit.fixed_point import Anderson, Broyden
from tritonimplicit.linear_solve import GMRES, BiCGSTAB, Neumann
from tritonimplicit.nn import DEQ, JFB, SHINE, Implicit, Phantom, Unrolled

DOUBLE = torch.float64
TIGHT = Anderson(batch_ndim=1, rtol=1e-14, maxiter=200)


class Cell(nn.Module):
    def __init__(self, n=6):
        super().__init__()
        self.w, self.u = nn.Linear(n, n, bias=False), nn.Linear(n, n)

    def forward(self, z, x):
        return 0.7 * torch.tanh(self.w(z) + self.u(x))


@pytest.fixture
def cell():
    torch.manual_seed(0)
    return Cell().to(DOUBLE)


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def parameter_gradient(z, cell):
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
    grads = torch.autograd.grad((weight * z).sum(), list(cell.parameters()))
    return torch.cat([g.flatten() for g in grads])


def of(gradient, cell, x):
    return parameter_gradient(DEQ(cell, solver=TIGHT, gradient=gradient)(x), cell)


def exact(cell, x):
    z = torch.zeros_like(x)
    for _ in range(300):
        z = cell(z, x)
    return parameter_gradient(z, cell)


def same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", [GMRES, BiCGSTAB])
def test_the_implicit_gradient_is_exact(cell, x, solver):
    same(of(Implicit(solver(rtol=1e-13, batch_ndim=1)), cell, x), exact(cell, x))


def test_a_foreign_solver(cell, x):
    def solve(matvec, b):  # each column of the matrix is a product
        n = b[0].numel()
        columns = [matvec((e.view_as(b[0]),))[0].flatten() for e in torch.eye(n, dtype=DOUBLE)]
        u = torch.linalg.solve(torch.stack(columns, 1), b[0].flatten())
        return (u.view_as(b[0]),)

    same(of(Implicit(solve), cell, x), exact(cell, x))


def test_gmres_stopped_early_comes_closer_step_by_step(cell, x):
    expected = exact(cell, x)
    errors = [
        (of(Implicit(GMRES(batch_ndim=1, maxiter=k, rtol=0.0)), cell, x) - expected).norm().item()
        for k in (1, 3, 6)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-10 * expected.norm()  # six unknowns


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("damping", [0.5, 1.0])
def test_phantom_and_the_truncated_neumann_series(cell, x, steps, damping):
    z = DEQ(cell, solver=TIGHT)(x).detach()
    for _ in range(steps):
        z = (1 - damping) * z + damping * cell(z, x)
    expected = parameter_gradient(z, cell)
    same(of(Phantom(steps, damping), cell, x), expected)
    # The series' terms are those steps, at the fixed point itself.
    series = Implicit(Neumann(batch_ndim=1, maxiter=steps - 1, alpha=damping))
    same(of(series, cell, x), expected)


def test_the_neumann_series_converges(cell, x):
    series = Implicit(Neumann(batch_ndim=1, maxiter=200))
    same(of(series, cell, x), exact(cell, x))


def test_the_neumann_series_says_that_it_goes_wrong():
    a = torch.full((2, 1), -3.0, dtype=DOUBLE, requires_grad=True)
    deq = DEQ(lambda z, a: a * z + 1, gradient=Implicit(Neumann(batch_ndim=1, maxiter=5)))
    z = deq(a)
    with pytest.warns(ConvergenceWarning, match="diverged"):
        z.sum().backward()
    assert (deq.last.backward.status == Status.DIVERGED).all()


def test_jfb_is_one_evaluation(cell, x):
    z = DEQ(cell, solver=TIGHT)(x).detach()
    same(of(JFB(), cell, x), parameter_gradient(cell(z, x), cell))


def test_unrolled_is_autograd_through_the_iteration(cell, x):
    z = torch.zeros_like(x)
    for _ in range(7):
        z = cell(z, x)
    deq = DEQ(cell, gradient=Unrolled(7), solver=Anderson(batch_ndim=1, rtol=0.5))
    got = deq(x)
    assert torch.equal(got, z)
    same(parameter_gradient(got, cell), parameter_gradient(z, cell))
    torch.testing.assert_close(
        deq.last.forward.residual_norm, (cell(z, x) - z).detach().norm(dim=1)
    )
    with pytest.warns(ConvergenceWarning, match=r"^Unrolled: .* give Unrolled more steps") as told:
        DEQ(cell, gradient=Unrolled(1))(x)
    assert "maxiter" not in str(told[0].message)


class TwoScales(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Linear(4, 4), nn.Linear(3, 3)
        self.down, self.up = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, z, x):
        fine, (coarse,) = z["fine"], z["coarse"]
        return {
            "fine": 0.6 * torch.tanh(self.fine(fine) + self.up(coarse) + x),
            "coarse": (0.6 * torch.tanh(self.coarse(coarse) + self.down(fine)),),
        }


@pytest.mark.parametrize(
    ("gradient", "solver"),
    [
        (Implicit(GMRES(rtol=1e-13, batch_ndim=1)), TIGHT),
        (Implicit(BiCGSTAB(rtol=1e-13, batch_ndim=1)), TIGHT),
        (Implicit(GMRES(rtol=0.0, batch_ndim=1, maxiter=14)), TIGHT),
        (Implicit(Neumann(batch_ndim=1, maxiter=400)), TIGHT),
        (Implicit(Neumann(batch_ndim=1, maxiter=400, alpha=0.8)), TIGHT),
        (SHINE(GMRES(rtol=1e-13, batch_ndim=1)), Broyden(batch_ndim=1, rtol=1e-14, maxiter=200)),
        (Phantom(400, 0.8), TIGHT),
        (Unrolled(400), TIGHT),
    ],
    ids=lambda way: type(way).__name__,
)
def test_those_that_come_to_the_exact_one_do_so_on_several_scales(gradient, solver):
    torch.manual_seed(0)
    layer, x = TwoScales().to(DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    z0 = {"fine": torch.zeros_like(x), "coarse": (torch.zeros(3, 3, dtype=DOUBLE),)}
    expected = z0
    for _ in range(400):
        expected = layer(expected, x)

    def gradients(z):
        loss = z["fine"].square().sum() + z["coarse"][0].sum()
        return torch.autograd.grad(loss, list(layer.parameters()))

    z = DEQ(layer, solver=solver, gradient=gradient)(x, z0=z0)
    for got, right in zip(gradients(z), gradients(expected), strict=True):
        same(got, right, 1e-9)


@pytest.mark.parametrize("gradient", [Phantom(2, 0.5), JFB(), Unrolled(60)])
def test_the_others_under_torch_func(cell, x, gradient):
    deq = DEQ(cell, solver=TIGHT, gradient=gradient)
    got = torch.func.grad(lambda x: deq(x).sum())(x)
    x = x.clone().requires_grad_()
    same(got, torch.autograd.grad(deq(x).sum(), x)[0])


@pytest.mark.parametrize("gradient", [Implicit(), SHINE(), Phantom(), JFB(), Unrolled(60)])
def test_one_dropout_mask_for_every_gradient(gradient):
    torch.manual_seed(0)
    w = nn.Linear(6, 6)
    dropout = nn.Dropout(0.5)
    layer = nn.Module()
    layer.w, layer.dropout = w, dropout
    layer.forward = lambda z, x: 0.3 * torch.tanh(dropout(w(z)) + x)
    deq = DEQ(layer, gradient=gradient, solver=Broyden(batch_ndim=1))
    deq(torch.randn(4, 6)).sum().backward()
    assert (deq.last.forward.status == Status.CONVERGED).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Phantom(steps=0), ValueError, "steps must be at least 1"),
        (lambda: Phantom(steps=1.5), TypeError, "steps must be an int"),
        (lambda: Phantom(damping=0), ValueError, "damping must be above 0"),
        (lambda: Phantom(damping=1.5), ValueError, "damping must be above 0"),
        (lambda: Unrolled(steps=-1), ValueError, "steps must not be negative"),
    ],
)
def test_misuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
