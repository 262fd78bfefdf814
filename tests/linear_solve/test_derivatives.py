"""Solvers called directly are differentiable in b, the ridge and what the matvec depends on."""

import dataclasses

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import tritonimplicit as ti
from tritonimplicit import LinearOperator
from tritonimplicit.linalg import cg, ns, ns_inv
from tritonimplicit.linear_solve import (
    CG,
    GMRES,
    MINRES,
    Auto,
    BiCGSTAB,
    Dense,
    Neumann,
    NormalCG,
)

DOUBLE = torch.float64
SOLVERS = {
    "cg": CG(rtol=1e-13),
    "normal_cg": NormalCG(rtol=1e-13),
    "neumann": Neumann(rtol=1e-13, maxiter=1000, alpha=0.25),
    "gmres": GMRES(rtol=1e-13),
    "bicgstab": BiCGSTAB(rtol=1e-13),
    "minres": MINRES(rtol=1e-13),
    "auto": Auto(rtol=1e-13),
    "dense": Dense(),
    "cholesky": Dense(positive_definite=True),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
forward_ad = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def root_of_spd(n=4):
    """A = W W^T / n + I / 2 has eigenvalues of order one."""
    return torch.randn(n, n, dtype=DOUBLE, requires_grad=True)


def symmetric(w):
    return w @ w.mT / w.shape[-1] + 0.5 * torch.eye(w.shape[-1], dtype=DOUBLE)


def by_closure(solver, w, b, ridge=None):
    a = symmetric(w)
    return solver(lambda v: a @ v, b, ridge=ridge)


def by_operator(solver, w, b, ridge=None):
    return solver(LinearOperator(lambda v, a: a @ v, symmetric(w)), b, ridge=ridge)


both_forms = pytest.mark.parametrize("solve", [by_closure, by_operator])


@every_solver
@both_forms
def test_first_and_second_derivatives(solver, solve):
    w, b = root_of_spd(), torch.randn(4, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda w, b: solve(solver, w, b), (w, b))
    assert gradgradcheck(lambda w, b: solve(solver, w, b), (w, b))


@every_solver
@both_forms
def test_derivatives_by_the_ridge(solver, solve):
    w, b = root_of_spd(), torch.randn(4, dtype=DOUBLE)
    ridge = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda w, r: solve(solver, w, b, r), (w, ridge))
    assert gradgradcheck(lambda w, r: solve(solver, w, b, r), (w, ridge))


@pytest.mark.parametrize("ridge", [0.3, torch.tensor([0.3, 0.9], dtype=DOUBLE)], ids=str)
@both_forms
def test_a_ridge_on_the_normal_equations_is_not_one_on_the_matrix(solve, ridge):
    """x = (A^T A + ridge)^-1 A^T b, with a float too: its derivative in A is not that of A^-1 b."""
    a = torch.randn(4, 4, dtype=DOUBLE, requires_grad=True)
    b = torch.randn(2, 4, dtype=DOUBLE)
    solver = NormalCG(rtol=1e-14, ridge=ridge, batch_ndim=1)
    fn = lambda v, a: v @ a.mT  # noqa: E731
    matvec = LinearOperator(fn, a) if solve is by_operator else lambda v: fn(v, a)
    (got,) = torch.autograd.grad(solver(matvec, b).sin().sum(), a)
    shift = torch.as_tensor(ridge, dtype=DOUBLE).expand(2)[:, None, None]
    normal = a.mT @ a + shift * torch.eye(4, dtype=DOUBLE)
    exact = torch.linalg.solve(normal, b @ a)
    torch.testing.assert_close(got, torch.autograd.grad(exact.sin().sum(), a)[0])


@both_forms
def test_a_third_derivative(solve):
    w, b = root_of_spd(3), torch.randn(3, dtype=DOUBLE)
    got = expected = None
    for x in (solve(SOLVERS["cg"], w, b), torch.linalg.solve(symmetric(w), b)):
        y = x.sin().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, w, create_graph=True)
            y = g.square().sum()
        got, expected = expected, y
    torch.testing.assert_close(got, expected)


@forward_ad
def test_a_hessian_by_autograd_is_differentiated_through_its_closure():
    """x = H(w)^-1 b with H v by torch.autograd.grad; no function of w is at hand to re-evaluate."""
    w = torch.randn(5, dtype=DOUBLE, requires_grad=True)
    b = torch.randn(5, dtype=DOUBLE)

    def energy(w):
        return w.cosh().sum() + 0.1 * w.sum() ** 2

    (gradient,) = torch.autograd.grad(energy(w), w, create_graph=True)

    def hvp(v):
        return torch.autograd.grad(
            gradient, w, v, create_graph=torch.is_grad_enabled(), retain_graph=True
        )[0]

    (got,) = torch.autograd.grad(CG(rtol=1e-13)(hvp, b).sin().sum(), w)
    exact = torch.linalg.solve(torch.func.hessian(energy)(w), b)
    torch.testing.assert_close(got, torch.autograd.grad(exact.sin().sum(), w)[0])


def test_the_matvecs_of_a_differentiated_solve():
    """A closure without gradients costs nothing; one with costs two products, for its graph."""
    scale, calls = torch.linspace(1, 2, 8, dtype=DOUBLE), []

    def matvec(v):
        calls.append(1)
        return scale * v

    counts = []
    for requires_grad in (False, True):
        scale.requires_grad_(requires_grad)
        calls.clear()
        CG(rtol=1e-10)(matvec, torch.ones(8, dtype=DOUBLE))
        counts.append(len(calls))
    assert counts[1] == counts[0] + 2


def test_a_solve_without_iterations_keeps_its_graph():
    scale = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    x = CG(maxiter=0)(lambda v: scale * v, torch.zeros(3, dtype=DOUBLE))
    (g,) = torch.autograd.grad(x.sum(), scale)
    assert g.tolist() == [0, 0, 0]


@both_forms
def test_a_change_in_place_is_noticed(solve):
    w, b = root_of_spd(), torch.randn(4, dtype=DOUBLE)
    x = solve(CG(), w, b)
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_pytrees_and_batches():
    a = (torch.rand(3, 4, dtype=DOUBLE) + 1).requires_grad_()
    c = (torch.rand(3, dtype=DOUBLE) + 1).requires_grad_()
    b = {"u": torch.randn(3, 4, dtype=DOUBLE), "v": torch.randn(3, 1, dtype=DOUBLE)}

    def fn(v, t):
        return {"u": t[0] * v["u"], "v": t[1][:, None] * v["v"]}

    solver = CG(rtol=1e-13, batch_ndim=1)
    for matvec in (LinearOperator(fn, (a, c)), lambda v: fn(v, (a, c))):
        x = solver(matvec, b)
        got = torch.autograd.grad(x["u"].sin().sum() + x["v"].exp().sum(), (a, c))
        exact = (b["u"] / a).sin().sum() + (b["v"][:, 0] / c).exp().sum()
        torch.testing.assert_close(got, torch.autograd.grad(exact, (a, c)))


@forward_ad
@every_solver
def test_every_transform_of_an_operator(solver):
    w, b = root_of_spd().detach(), torch.randn(4, dtype=DOUBLE)
    ours = lambda w, b: by_operator(solver, w, b)  # noqa: E731
    exact = lambda w, b: torch.linalg.solve(symmetric(w), b)  # noqa: E731
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        for argnum in (0, 1):
            got = transform(ours, argnums=argnum)(w, b)
            torch.testing.assert_close(got, transform(exact, argnums=argnum)(w, b))
    scalar = lambda solve: lambda w: solve(w, b).sin().sum()  # noqa: E731
    hessians = [torch.func.hessian(scalar(solve))(w) for solve in (ours, exact)]
    torch.testing.assert_close(*hessians)


def test_a_vmap_over_everything_is_one_batched_solve():
    ws, bs = torch.randn(5, 4, 4, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)
    ridges, guesses = torch.rand(5, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)

    def solve(w, b, ridge, init):
        solver = CG(rtol=1e-13, ridge=ridge, init=init)
        return by_operator(dataclasses.replace(solver), w, b, ridge)

    with ti.record_solves() as log:
        x = torch.func.vmap(solve)(ws, bs, ridges, guesses)
    assert [solution.status.shape for solution in log] == [(5,)]
    matrices = symmetric(ws) + ridges[:, None, None] * torch.eye(4, dtype=DOUBLE)
    torch.testing.assert_close(x, torch.linalg.solve(matrices, bs))
    # From an exact guess no iteration is needed: the guesses have reached their systems.
    with ti.record_solves() as log:
        torch.func.vmap(solve)(ws, bs, ridges, x)
    assert log[0].iterations.max() <= 1


def test_settings_that_are_not_vmapped_hold_for_every_system():
    bs, guess = torch.randn(5, 2, 4, dtype=DOUBLE), torch.randn(2, 4, dtype=DOUBLE)
    ridge = torch.tensor([0.5, 1.0], dtype=DOUBLE)
    solver = CG(rtol=1e-13, ridge=ridge, init=guess, batch_ndim=1)
    x = torch.func.vmap(lambda b: solver(lambda v: v, b))(bs)
    torch.testing.assert_close(x, bs / (1 + ridge[:, None]))


def test_matrices_are_differentiable_under_vmap_and_grad():
    matrices = symmetric(torch.randn(3, 4, 4, dtype=DOUBLE))
    bs = torch.randn(3, 4, dtype=DOUBLE)
    for ours in (
        lambda a, b: cg(a, b, rtol=1e-13).sin().sum(),
        lambda a, b: ns(a, b, 600, alpha=0.3).sin().sum(),
        lambda a, b: (ns_inv(a, 600, alpha=0.3) @ b).sin().sum(),
    ):
        got = torch.func.vmap(torch.func.grad(ours))(matrices, bs)
        exact = torch.func.grad(lambda a: torch.linalg.solve(a, bs).sin().sum())(matrices)
        torch.testing.assert_close(got, exact)


def test_a_closure_over_a_transformed_tensor_is_an_error_that_names_the_way_out():
    b = torch.ones(4, dtype=DOUBLE)
    for solver in SOLVERS.values():
        with pytest.raises(RuntimeError, match="LinearOperator"):
            torch.func.grad(lambda w, s=solver: by_closure(s, w, b).sum())(root_of_spd().detach())


def test_a_closures_gradient_is_not_lost_where_a_transform_works_on_b():
    scale = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="LinearOperator"):
        torch.func.grad(lambda b: CG()(lambda v: scale * v, b).sum())(torch.ones(3))


def test_a_differentiated_ridge_inside_custom_root():
    """As u = (A + ridge)^-1 g, du / d ridge = -(A + ridge)^-1 u."""
    ridge = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    scale = torch.tensor([1.0, 3.0], dtype=DOUBLE)
    theta = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    root = ti.custom_root(lambda x, t: scale * x - t, argnums=1, solve=CG(rtol=1e-13, ridge=ridge))
    x = root(lambda _, t: t / scale)(torch.zeros(2, dtype=DOUBLE), theta)
    (g,) = torch.autograd.grad(x.sum(), theta, create_graph=True)
    torch.testing.assert_close(g, 1 / (scale + ridge))
    (second,) = torch.autograd.grad(g.sum(), ridge)
    torch.testing.assert_close(second, (-1 / (scale + ridge) ** 2).sum())
    normal = dataclasses.replace(NormalCG(), ridge=ridge)
    root = ti.custom_root(lambda x, t: scale * x - t, argnums=1, solve=normal)
    x = root(lambda _, t: t / scale)(torch.zeros(2, dtype=DOUBLE), theta)
    with pytest.raises(RuntimeError, match="A\\^T A"):
        torch.autograd.grad(x.sum(), theta, create_graph=True)


def test_operators_are_checked():
    with pytest.raises(TypeError, match="function"):
        LinearOperator(torch.eye(2))
    with pytest.raises(TypeError, match="float"):
        LinearOperator(lambda v, a: a * v, 2.0)


class Shift:
    """v -> cyclic shift plus scale, knowing its transpose, which autograd could not record."""

    symmetric = False

    def __init__(self, scale, by=1):
        self.scale, self.by, self.products = scale, by, 0

    def __call__(self, v):
        self.products += 1
        return (v.detach().roll(self.by) if not self.scale.requires_grad else v.roll(self.by)) + (
            self.scale * v
        )

    @property
    def T(self):
        return Shift(self.scale, -self.by)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_operators_own_transpose_is_used(requires_grad):
    scale = torch.linspace(2, 3, 6, dtype=DOUBLE).requires_grad_(requires_grad)
    b = torch.randn(6, dtype=DOUBLE)
    matrix = torch.eye(6, dtype=DOUBLE).roll(1, 0) + torch.diag(scale)
    x = NormalCG(rtol=1e-13)(Shift(scale), b)
    torch.testing.assert_close(x.detach(), torch.linalg.solve(matrix, b).detach())
    if requires_grad:
        (got,) = torch.autograd.grad(x.sin().sum(), scale)
        exact = torch.linalg.solve(matrix, b).sin().sum()
        torch.testing.assert_close(got, torch.autograd.grad(exact, scale)[0])


def test_what_an_operator_says_of_itself_is_heard():
    class Definite:
        symmetric = positive_definite = True

        def __call__(self, v):
            return 2 * v

    with ti.record_solves() as log:
        Auto()(Definite(), torch.ones(50))
    assert log[0].solver == "CG"


# --- What a closure reaches when the backward pass comes ------------------------------------------


def gradient_of(solve, *inputs):
    return torch.autograd.grad(solve().sin().sum(), inputs)


def test_a_closures_variable_may_be_bound_to_something_else_before_the_backward_pass():
    base = (torch.eye(3, dtype=DOUBLE) + 0.1 * torch.randn(3, 3, dtype=DOUBLE)).requires_grad_()
    b = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    got, expected = [], []
    for i in range(3):
        a = base @ base.mT + i * torch.eye(3, dtype=DOUBLE)
        got.append(GMRES(rtol=1e-13)(lambda v: a @ v, b))  # noqa: B023
        expected.append(torch.linalg.solve(a, b))
    loss = [sum(x.sin().sum() for x in xs) for xs in (got, expected)]
    grads = [torch.autograd.grad(y, (base, b), retain_graph=True) for y in loss]
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_constant_of_the_closure_that_changes_in_place_is_noticed():
    w, d = torch.ones(3, dtype=DOUBLE, requires_grad=True), torch.ones(3, dtype=DOUBLE)
    x = CG()(lambda v: w * d * v, torch.ones(3, dtype=DOUBLE))
    d.add_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_a_second_derivative_of_a_closure_that_has_changed_is_an_error():
    w, factor = torch.ones(3, dtype=DOUBLE, requires_grad=True), [1.0]
    x = CG()(lambda v: factor[0] * w * v, torch.ones(3, dtype=DOUBLE))
    factor[0] = 2.0
    (g,) = torch.autograd.grad(x.sum(), w, retain_graph=True)
    torch.testing.assert_close(g, -torch.ones(3, dtype=DOUBLE))  # that of the forward pass
    with pytest.raises(RuntimeError, match="another result than in the forward pass"):
        torch.autograd.grad(x.sum(), w, create_graph=True)


def test_hooks_run_once_and_tensors_on_the_way_get_gradients():
    w = torch.randn(3, 3, dtype=DOUBLE, requires_grad=True)
    b, results = torch.ones(3, dtype=DOUBLE), []
    w.register_hook(lambda g: 2 * g)
    for solve in (lambda a: CG(rtol=1e-13)(lambda v: a @ v, b), lambda a: torch.linalg.solve(a, b)):
        w.grad, a = None, symmetric(w)
        a.retain_grad()
        solve(a).sin().sum().backward()
        results.append((w.grad, a.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    sym = [g + g.mT for _, g in results]  # CG's matrix is symmetric, whatever its elements do
    torch.testing.assert_close(*sym)


def test_a_module_in_a_functional_call_gives_the_parameters_of_that_call_their_gradient():
    class Solving(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3, dtype=DOUBLE))

        def forward(self, b):
            return GMRES(rtol=1e-13)(lambda v: self.w * v, b)

    w2 = torch.tensor([2.0, 3.0, 4.0], dtype=DOUBLE, requires_grad=True)
    b = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    x = torch.func.functional_call(Solving(), {"w": w2}, (b,))
    got = torch.autograd.grad(x.sum(), (w2, b))
    torch.testing.assert_close(got, (-1 / w2.detach() ** 2, 1 / w2.detach()))


def test_a_hessian_taken_anew_in_each_product():
    w = torch.randn(4, dtype=DOUBLE, requires_grad=True)
    b = torch.randn(4, dtype=DOUBLE)

    def hvp(v):
        with torch.enable_grad():
            (g,) = torch.autograd.grad(w.cosh().sum(), w, create_graph=True)
            return torch.autograd.grad(g, w, v, create_graph=True)[0]

    (got,) = torch.autograd.grad(CG(rtol=1e-13)(hvp, b).sum(), w)
    torch.testing.assert_close(got, torch.autograd.grad((b / w.cosh()).sum(), w)[0])


@pytest.mark.parametrize("solver", [GMRES(rtol=1e-12), BiCGSTAB(rtol=1e-12)], ids=str)
def test_a_function_M_is_not_used_for_the_transpose(solver):
    torch.manual_seed(0)
    a = (torch.eye(20, dtype=DOUBLE) * 3 + torch.randn(20, 20, dtype=DOUBLE)).requires_grad_()
    inverse, b = torch.linalg.inv(a.detach()), torch.randn(20, dtype=DOUBLE)
    solver = dataclasses.replace(solver, M=lambda r: inverse @ r, maxiter=500)
    for matvec in (LinearOperator(lambda v, a: a @ v, a), lambda v: a @ v):
        with ti.record_solves() as log:
            (got,) = torch.autograd.grad(solver(matvec, b).sin().sum(), a)
        assert log[0].iterations == 1
        exact = torch.autograd.grad(torch.linalg.solve(a, b).sin().sum(), a)[0]
        torch.testing.assert_close(got, exact)


def test_an_operator_that_does_not_name_all_its_tensors_is_refused():
    w, d = (torch.ones(3, requires_grad=True) for _ in range(2))
    for names in ((d,), (d.detach(),)):
        op = LinearOperator(lambda v, d: w * v + d * v, *names)
        with pytest.raises(RuntimeError, match="does not name"):
            CG()(op, torch.ones(3, requires_grad=True))


def test_what_an_operator_was_told_holds_where_it_is_differentiated():
    a = torch.full((50,), 2.0, requires_grad=True)
    with ti.record_solves() as log:
        Auto()(LinearOperator(lambda v, a: a * v, a, positive_definite=True), torch.ones(50))
    assert [solution.solver for solution in log] == ["CG"]


def test_a_vmapped_ridge_with_a_plain_matvec():
    ridges, b = torch.tensor([0.5, 1.0], dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    solve = lambda r: CG(rtol=1e-13, ridge=r)(lambda v: 2 * v, b)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(solve)(ridges), b / (2 + ridges[:, None]))
    got = torch.func.grad(lambda r: solve(r).sum())(ridges[0])
    torch.testing.assert_close(got, torch.tensor(-3 / 2.5**2, dtype=DOUBLE))


def test_a_log_holds_values_of_its_own():
    b = torch.ones(3, requires_grad=True)
    with ti.record_solves() as log:
        x = CG()(lambda v: 2 * v, b)
    with torch.no_grad():
        x.mul_(100)
    assert log[0].value.tolist() == [0.5] * 3 and not log[0].value.requires_grad


@pytest.mark.parametrize("openly", [False, True])
@pytest.mark.parametrize("solver", [CG(), Dense()], ids=["cg", "dense"])
def test_the_old_vmap_of_autograd_is_refused(solver, openly):
    scale, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2, requires_grad=True)
    operator = LinearOperator(torch.mul, scale) if openly else lambda v: scale * v
    x = solver(operator, b)
    with pytest.raises(RuntimeError, match=r"is_grads_batched.*torch\.func\.jacrev"):
        torch.autograd.grad(x, (scale, b), torch.eye(2), is_grads_batched=True)
