"""Our solvers as those of torchdeq 0.1.0, by its registry."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

import tritonimplicit as ti
from tests.test_readme import PAGES, python_blocks, run
from tritonimplicit import Status
from tritonimplicit.fixed_point import Anderson, Broyden, Picard
from tritonimplicit.linear_solve import GMRES, BiCGSTAB, Dense, Neumann, NormalCG
from tritonimplicit.nn import torchdeq_solver

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its docstrings have invalid escape sequences
    import torchdeq
    from torchdeq.solver import register_solver

F64 = torch.float64
SOLVERS = {
    "ti picard": Picard(batch_ndim=1),
    "ti anderson": Anderson(batch_ndim=1),
    "ti broyden": Broyden(batch_ndim=1),
    "ti gmres": GMRES(batch_ndim=1),
    "ti gmres whole": GMRES(),
    "ti bicgstab": BiCGSTAB(batch_ndim=1),
    "ti neumann": Neumann(batch_ndim=1),
}
FORWARD = ("ti picard", "ti anderson", "ti broyden")
BACKWARD = ("ti anderson", "ti broyden", "ti gmres", "ti gmres whole", "ti bicgstab", "ti neumann")


@pytest.fixture(autouse=True, scope="module")
def registered():
    for name, solver in SOLVERS.items():
        register_solver(name, torchdeq_solver(solver))


class Cell(nn.Module):
    def __init__(self, n=6):
        super().__init__()
        self.w, self.u = nn.Linear(n, n, bias=False), nn.Linear(n, n)

    def forward(self, z, x):
        return 0.6 * torch.tanh(self.w(z) + self.u(x))


def problem():
    torch.manual_seed(0)
    return Cell().to(F64), torch.randn(4, 6, dtype=F64)


def gradients(z, cell):
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
    grads = torch.autograd.grad((weight * z).sum(), list(cell.parameters()))
    return torch.cat([g.flatten() for g in grads])


def exact(cell, x):
    z = torch.zeros_like(x)
    for _ in range(300):
        z = cell(z, x)
    return z, gradients(z, cell)


TIGHT = {"f_tol": 1e-12, "b_tol": 1e-12, "f_max_iter": 200, "b_max_iter": 200}


@pytest.mark.parametrize("core", ["indexing", "sliced"])
@pytest.mark.parametrize("way", ["ift", "hook_ift"])
@pytest.mark.parametrize(
    ("forward", "backward"),
    [*itertools.product(FORWARD[1:2], BACKWARD), *itertools.product(FORWARD, BACKWARD[2:3])],
)
def test_the_gradient_is_exact(core, way, forward, backward):
    cell, x = problem()
    deq = torchdeq.get_deq(core=core, f_solver=forward, b_solver=backward, **{way: True}, **TIGHT)
    told: list[dict[str, Tensor]] = []
    (z,), info = deq(lambda z: cell(z, x), torch.zeros_like(x), backward_writer=told.append)
    expected, gradient = exact(cell, x)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(z, cell), gradient, rtol=1e-9, atol=1e-9)
    for statistics in (info, *told):
        assert (statistics["status"] == Status.CONVERGED).all()
        assert statistics["abs_lowest"].shape == statistics["nstep"].shape == (4,)
        assert (statistics["abs_lowest"] <= 1e-12).all()
    assert len(told) == 1


def test_the_statistics_are_those_of_the_result():
    cell, x = problem()
    solve = torchdeq_solver(Anderson(batch_ndim=1))
    z, states, info = solve(lambda z: cell(z, x), torch.zeros_like(x), tol=1e-3)
    residual = (cell(z, x) - z).detach().norm(dim=1)
    assert states == []
    torch.testing.assert_close(info["abs_lowest"], residual)
    torch.testing.assert_close(info["rel_lowest"], residual / z.norm(dim=1))
    assert torch.equal(info["abs_trace"], info["abs_lowest"][:, None])
    theirs = torchdeq.solver.get_solver("anderson")(lambda z: cell(z, x), torch.zeros_like(x))[2]
    assert set(info) == {*theirs, "status"}
    assert all(info[name].ndim == theirs[name].ndim for name in theirs)


@pytest.mark.parametrize("solver", [Anderson(batch_ndim=1), GMRES(batch_ndim=1)])
def test_tolerances_are_torchdeqs(solver):
    scale = torch.linspace(-0.8, 0.9, 30, dtype=F64).repeat(2, 1)
    g = torch.linspace(1, 2, 30, dtype=F64) * torch.tensor([[1.0], [100.0]], dtype=F64)

    def f(y):
        return scale * y + g

    solve = torchdeq_solver(solver)
    for tol in (1e-1, 1e-5):
        z, _, info = solve(f, torch.zeros_like(g), 300, tol, "abs")
        residual = (f(z) - z).norm(dim=1)
        assert (residual <= tol).all()
        torch.testing.assert_close(info["abs_lowest"], residual, rtol=1e-6, atol=1e-12)
    z, _, _ = solve(f, torch.zeros_like(g), tol=1e-2, stop_mode="rel")
    residual = (f(z) - z).norm(dim=1)
    assert (residual <= 1e-2 * torch.maximum(f(z).norm(dim=1), g.norm(dim=1))).all()
    assert residual[1] > 1e-6  # it has stopped when it may


def test_a_map_that_does_not_contract():
    # Eigenvalues of J down to -4: torchdeq's default leaves nothing of a gradient.
    torch.manual_seed(0)
    scale = torch.linspace(-4, 0.5, 8, dtype=F64).repeat(3, 1).requires_grad_()
    x = torch.ones(3, 8, dtype=F64)
    errors = {}
    for backward in ("fixed_point_iter", "ti gmres"):
        deq = torchdeq.get_deq(ift=True, f_solver="ti broyden", b_solver=backward, f_tol=1e-10)
        (z,), _ = deq(lambda z: scale * z + x, torch.zeros_like(x))
        (got,) = torch.autograd.grad(z.sum(), scale)
        expected = ((1 - scale) ** -2).detach()
        errors[backward] = ((got - expected).norm() / expected.norm()).item()
    assert errors["ti gmres"] < 1e-5 and not errors["fixed_point_iter"] < 0.1


def test_a_small_cotangent_in_single_precision_is_not_drowned():
    scale = torch.tensor([[0.5, -0.8, 0.3], [0.1, 0.2, 0.9]])
    g = torch.tensor([[1.0, 2.0, 3.0], [3e-9, 1e-9, 2e-9]]) * torch.tensor([[1e8], [1.0]])
    solve = torchdeq_solver(GMRES(batch_ndim=1))
    y, _, _ = solve(lambda y: scale * y + g, torch.zeros_like(g), tol=1e-5, stop_mode="rel")
    # Residuals of 1e-5 ‖g‖, times at most 1 / (1 - 0.9).
    error = (y.double() - g.double() / (1 - scale.double())).norm(dim=1)
    assert (error <= 1.1e-4 * g.double().norm(dim=1)).all()


def test_several_scales():
    torch.manual_seed(0)
    a, b = (torch.nn.Linear(5, n).to(F64) for n in (2, 3))
    x = torch.randn(4, 2, dtype=F64)

    def f(first, second):
        both = torch.cat([first, second], 1)
        return 0.5 * torch.tanh(a(both)) + x, 0.5 * torch.tanh(b(both))

    z0 = [torch.zeros(4, 2, dtype=F64), torch.zeros(4, 3, dtype=F64)]
    z = tuple(z0)
    for _ in range(200):
        z = f(*z)
    expected = torch.autograd.grad(z[0].sum() + z[1].square().sum(), list(a.parameters()))
    for no_stat in (False, True):
        gradient = {"grad": 60} if no_stat else {"ift": True}  # a list has no implicit gradient
        deq = torchdeq.get_deq(
            f_solver="ti anderson", b_solver="ti gmres", no_stat=no_stat, **gradient, **TIGHT
        )
        (got,), _ = deq(f, z0)
        grads = torch.autograd.grad(got[0].sum() + got[1].square().sum(), list(a.parameters()))
        for one, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-8, atol=1e-8)


def test_states_on_the_way_for_its_fixed_point_correction():
    cell, x = problem()
    deq = torchdeq.get_deq(core="indexing", f_solver="ti picard", indexing=[2, 5], **TIGHT)
    states, _ = deq(lambda z: cell(z, x), torch.zeros_like(x))
    z, by_hand = torch.zeros_like(x), []
    for k in range(1, 201):
        z = cell(z, x)
        if k in (3, 6, 200):  # one evaluation after 2, 5 and all
            by_hand.append(z)
    assert len(states) == 3
    for got, right in zip(states, by_hand, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-10)


def test_evaluation_tells_the_spectral_radius():
    cell, x = problem()
    deq = torchdeq.get_deq(f_solver="ti anderson", **TIGHT).eval()
    _, info = deq(lambda z: cell(z, x), torch.zeros_like(x), sradius_mode=True)
    assert (info["sradius"] > 0).all()


def test_what_does_not_converge_is_told():
    deq = torchdeq.get_deq(ift=True, f_solver="ti picard", b_solver="ti gmres", b_max_iter=1)
    x = torch.linspace(0.1, 0.9, 6, dtype=F64).view(2, 3).requires_grad_()
    with pytest.warns(ti.ConvergenceWarning, match="Picard: .* torchdeq's info"):
        deq(lambda z: z + x, torch.zeros_like(x))
    (z,), _ = deq(lambda z: 0.5 * x * z + 1, torch.zeros_like(x))
    with pytest.warns(ti.ConvergenceWarning, match="GMRES: .* backward_writer"):
        z.sum().backward()
    with pytest.raises(ti.ConvergenceError):
        torchdeq_solver(Picard(on_failure="raise"))(lambda z: z + 1, torch.zeros(2))


def test_misuse():
    with pytest.raises(RuntimeError, match=r"not affine.*fixed_point"):
        torchdeq_solver(GMRES())(torch.cos, torch.zeros(3))
    with pytest.raises(ValueError, match="GMRES is a linear solver, which has no iterates"):
        torchdeq_solver(GMRES())(lambda y: 0.5 * y + 1, torch.zeros(3), indexing=[1])
    with pytest.raises(TypeError, match="NormalCG needs the transpose"):
        torchdeq_solver(NormalCG(batch_ndim=1))
    with pytest.raises(TypeError, match="solver must be one of"):
        torchdeq_solver(Dense())
    with pytest.raises(ValueError, match="stop_mode must be one of 'abs', 'rel'"):
        torchdeq_solver(Picard())(torch.cos, torch.zeros(3), stop_mode="both")


def test_the_same_penalty_and_correction():
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(4, 6)
    z = torch.randn(4, 6, requires_grad=True)
    torch.manual_seed(1)
    theirs = torchdeq.loss.jac_reg(cell(z, x), z)
    torch.manual_seed(1)
    torch.testing.assert_close(ti.nn.jacobian_penalty(lambda z: cell(z, x), z), theirs)
    states = [torch.randn(4, 6) for _ in range(3)]
    theirs = torchdeq.loss.fp_correction(lambda z: z.square().mean(), (states,), gamma=0.7)
    ours = ti.nn.fixed_point_correction(lambda z: z.square().mean(), states, decay=0.7)
    torch.testing.assert_close(ours, theirs)


BLOCKS = [block for page in PAGES for block in python_blocks(page) if "import torchdeq" in block]


def test_the_example_of_the_docs():
    (block,) = BLOCKS
    _, printed = run(block)
    assert printed.splitlines() == [
        line.split("  # ")[1] for line in block.splitlines() if line.startswith("print(")
    ]
