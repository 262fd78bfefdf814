"""Gradients of roots against closed forms, and what a wrong use is told."""

import collections

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call

import tritonimplicit as ti
from tritonimplicit import custom_root
from tritonimplicit.linear_solve import CG, GMRES, Dense, Neumann, NormalCG

DOUBLE = torch.float64
PREFIX = r"^custom_root\(optimality_fn\)\(solver_fn\)\(\*args\):"
TIGHT = [
    None,
    CG(rtol=1e-13),
    NormalCG(rtol=1e-13),
    Neumann(rtol=1e-13, maxiter=2000, alpha=0.02),
    Dense(),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def ridge():
    """x = argmin |A x - y|^2 / 2 + lam |x|^2 / 2: optimality, closed form, lam, y."""
    a, y = torch.randn(20, 5, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE, requires_grad=True)
    lam = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)

    def optimality(x, lam, y):
        return a.T @ (a @ x - y) + lam * x

    def closed(lam, y):
        return torch.linalg.solve(a.T @ a + lam * torch.eye(5, dtype=DOUBLE), a.T @ y)

    return optimality, closed, lam, y


@pytest.mark.parametrize("solve", TIGHT, ids=lambda s: type(s).__name__)
def test_ridge_regression_in_closed_form(ridge, solve):
    optimality, closed, lam, y = ridge
    solver = custom_root(optimality, argnums=(1, 2), solve=solve)(lambda _, lam, y: closed(lam, y))
    got = grad(solver(None, lam, y).pow(3).sum(), (lam, y))
    # The default normal CG stops at 1e-5 on equations of condition number about 20^2.
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if solve is None else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(got, grad(closed(lam, y).pow(3).sum(), (lam, y)), **tolerance)


@pytest.mark.parametrize("solve", [CG(rtol=1e-13), Dense()], ids=lambda s: type(s).__name__)
def test_first_and_second_order_by_finite_differences(ridge, solve):
    optimality, closed, lam, y = ridge
    solver = custom_root(optimality, argnums=(1, 2), solve=solve)(lambda _, lam, y: closed(lam, y))
    assert gradcheck(lambda lam, y: solver(None, lam, y), (lam, y))
    assert gradgradcheck(lambda lam, y: solver(None, lam, y), (lam, y))


def nth_derivative(f, at, order):
    value = f(at).pow(3).sum()
    for _ in range(order):
        (value,) = grad(value, at, create_graph=True)
    return value


@pytest.mark.parametrize("order", [1, 2, 3])
def test_higher_orders_against_the_closed_form(ridge, order):
    optimality, closed, lam, y = ridge
    solver = custom_root(optimality, argnums=1, solve=Dense())(lambda _, lam, y: closed(lam, y))
    got = nth_derivative(lambda lam: solver(None, lam, y), lam, order)
    expected = nth_derivative(lambda lam: closed(lam, y), lam, order)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_nonsymmetric_fixed_point_to_second_order():
    w, x = 0.2 * torch.randn(4, 4, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    w.requires_grad_(), x.requires_grad_()

    def iterate(z, w, x):
        for _ in range(200):
            z = torch.tanh(w @ z + x)
        return z

    def residual(z, w, x):
        return z - torch.tanh(w @ z + x)

    solver = custom_root(residual, argnums=(1, 2), solve=Dense())(iterate)
    start = torch.zeros(4, dtype=DOUBLE)
    assert gradcheck(lambda w, x: solver(start, w, x), (w, x))
    assert gradgradcheck(lambda w, x: solver(start, w, x), (w, x))
    got = grad(solver(start, w, x).pow(3).sum(), (w, x))
    torch.testing.assert_close(got, grad(iterate(start, w, x).pow(3).sum(), (w, x)))


def test_torch_func_grad(ridge):
    optimality, closed, lam, y = ridge
    solver = custom_root(optimality, argnums=1, solve=Dense())(lambda _, lam, y: closed(lam, y))
    got = torch.func.grad(lambda lam: solver(None, lam, y.detach()).sum())(lam.detach())
    torch.testing.assert_close(got, grad(closed(lam, y).sum(), lam)[0])


def test_the_optimality_is_evaluated_once_in_a_backward_pass(ridge):
    optimality, closed, lam, y = ridge
    calls = []

    def counted(x, lam, y):
        calls.append(1)
        return optimality(x, lam, y)

    solver = custom_root(counted, argnums=1)(lambda _, lam, y: closed(lam, y))
    solver(None, lam, y.detach()).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("argnums", [2, (1, 3), (3,), (1, 2, 3)])
def test_any_positions(argnums):
    """x = a + 2 b + 3 c."""
    a, b, c = (torch.randn(3, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    solver = custom_root(lambda x, a, b, c: x - a - 2 * b - 3 * c, argnums=argnums, solve=CG())(
        lambda _, a, b, c: a + 2 * b + 3 * c
    )
    solver(None, a, b, c).sum().backward()
    named = (argnums,) if isinstance(argnums, int) else argnums
    for position, tensor in enumerate((a, b, c), start=1):
        if position in named:
            torch.testing.assert_close(tensor.grad, torch.full_like(tensor, position))
        else:
            assert tensor.grad is None


def test_the_initial_guess_gets_no_gradient():
    init, target = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    solver = custom_root(lambda x, t: x - t, argnums=1)(lambda init, t: init * 0 + t)
    solver(init, target).sum().backward()
    assert init.grad is None and target.grad.tolist() == [1, 1]


Point = collections.namedtuple("Point", "u v")


def test_pytrees_in_and_out():
    p = {"scale": torch.tensor(2.0, requires_grad=True), "name": "p", "none": None}
    y = torch.randn(3)

    def optimality(sol, p, *, power):
        return {"x": Point(p["scale"] * sol["x"].u - y, None), "k": sol["k"] ** power - p["scale"]}

    @custom_root(optimality, argnums=1, has_aux=True, solve=Dense())
    def solver(init, p, *, power):
        solution = {"x": Point(y / p["scale"], None), "k": p["scale"] ** (1 / power)}
        return solution, {"power": power, "p": p}

    solution, aux = solver(None, p, power=3)
    assert isinstance(solution["x"], Point) and solution["x"].v is None
    assert solution["k"].shape == () and aux["power"] == 3 and aux["p"]["name"] == "p"
    (got,) = grad(solution["x"].u.sum() + solution["k"], p["scale"])
    scale = p["scale"].detach()
    torch.testing.assert_close(got, -y.sum() / scale**2 + scale ** (1 / 3 - 1) / 3)


def test_a_module_through_functional_call():
    layer = torch.nn.Linear(3, 3).double()
    torch.nn.utils.parametrizations.spectral_norm(layer)
    layer.eval()
    weights = dict(layer.named_parameters())

    def cell(z, weights, x):
        return 0.5 * torch.tanh(functional_call(layer, weights, (z,)) + x)

    def iterate(z, weights, x):
        for _ in range(100):
            z = cell(z, weights, x)
        return z

    solver = custom_root(lambda z, weights, x: z - cell(z, weights, x), argnums=1, solve=Dense())(
        iterate
    )
    x, leaves = torch.randn(4, 3, dtype=DOUBLE), tuple(weights.values())
    got = grad(solver(torch.zeros_like(x), weights, x).square().sum(), leaves)
    expected = grad(iterate(torch.zeros_like(x), weights, x).square().sum(), leaves)
    torch.testing.assert_close(got, expected)


def test_keywords_and_defaults_reach_the_optimality():
    def optimality(x, a, b=2.0, *, c, **rest):
        return x - a * b * c * rest["d"]

    @custom_root(optimality, argnums=1)
    def solver(init, a, b=2.0, *, c=5.0, **rest):
        return a * b * c * rest["d"]

    a = torch.ones(2, requires_grad=True)
    (got,) = grad(solver(None, a=a, d=7.0).sum(), a)
    torch.testing.assert_close(got, torch.full((2,), 70.0))


def test_a_batch_of_roots_is_one_batched_solve():
    shapes = []

    def solve(matvec, b):
        shapes.append(tuple(b[0].shape))
        return CG(batch_ndim=1, rtol=1e-12)(matvec, b)

    scale = torch.rand(5, 1, dtype=DOUBLE) + 0.5
    x = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    solver = custom_root(lambda z, x: scale * z + z.pow(3) - x, argnums=1, solve=solve)
    root = solver(lambda _, x: newton(scale, x))(None, x)
    (got,) = grad(root.sum(), x)
    torch.testing.assert_close(got, 1 / (scale + 3 * root.detach() ** 2))
    assert shapes == [(5, 4)]


def newton(scale, x):
    z = torch.zeros_like(x)
    for _ in range(50):
        z = z - (scale * z + z**3 - x) / (scale + 3 * z**2)
    return z


def test_outputs_do_not_share_memory_with_inputs():
    a = torch.ones(2, requires_grad=True)
    solution = custom_root(lambda x, a: x - a, argnums=1)(lambda _, a: a)(None, a)
    with torch.no_grad():
        solution += 1
    assert a.tolist() == [1, 1]


def test_a_change_in_place_before_the_backward_pass_is_noticed():
    y = torch.ones(2)
    lam = torch.tensor(2.0, requires_grad=True)
    solution = custom_root(lambda x, lam, y: lam * x - y, argnums=1)(lambda _, lam, y: y / lam)(
        None, lam, y
    )
    y += 1
    with pytest.raises(RuntimeError, match="inplace"):
        solution.sum().backward()


def test_a_solver_that_works_on_its_initial_guess_in_place():
    """Twice, with a backward pass after both: the first must not look at the guess any more."""
    guess, lam = torch.zeros(2), torch.tensor(2.0, requires_grad=True)

    @custom_root(lambda x, lam: lam * x - 1, argnums=1)
    def solver(x, lam):
        return x.copy_((1 / lam).expand(2))

    first = solver(guess, lam)
    second = solver(guess, lam)
    (got,) = grad((first + second).sum(), lam)
    torch.testing.assert_close(got, torch.tensor(-1.0))


def test_a_solver_that_overwrites_what_the_optimality_depends_on_is_an_error():
    meta = torch.ones(2, requires_grad=True)
    solver = custom_root(lambda x, meta: x - 0.5 * meta, argnums=1)(lambda x, meta: x.mul_(0.5))
    with pytest.raises(RuntimeError, match=PREFIX + ".*in place"):
        solver(meta, meta)
    assert solver(meta.detach().clone(), meta).tolist() == [0.25, 0.25]  # meta is now 0.5


def test_no_gradient_asked_for_is_none_computed():
    def refuse(matvec, b):
        raise AssertionError("no solve is needed")

    solver = custom_root(lambda x, a: x - a, argnums=1, solve=refuse)(lambda _, a: a + 0)
    assert not solver(None, torch.ones(2)).requires_grad
    with torch.no_grad():
        assert not solver(None, torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_cotangent_gives_nan_and_a_warning(bad):
    a = torch.ones(2, requires_grad=True)
    solution = custom_root(lambda x, a: x - a, argnums=1)(lambda _, a: a + 0)(None, a)
    with pytest.warns(ti.ConvergenceWarning, match="NaN or infinity"):
        (got,) = grad(solution, a, torch.tensor([1.0, bad]))
    assert got.isnan().all()


def test_a_tensor_in_a_closure_that_requires_grad_is_warned_of():
    weight = torch.nn.Parameter(torch.full((2,), 0.5))
    x = torch.ones(2, requires_grad=True)
    solver = custom_root(lambda z, x: z - weight * z - x, argnums=1, solve=CG())(
        lambda _, x: x / (1 - weight)
    )
    with pytest.warns(UserWarning, match=r"1 tensors that require grad .* \(2,\)"):
        solver(None, x).sum().backward()
    assert weight.grad is None


def test_solvers_of_the_same_form_are_accepted_and_held_to_it():
    a = torch.ones(2, requires_grad=True)

    def root(solve):
        return custom_root(lambda x, a: x - a, argnums=1, solve=solve)(lambda _, a: a + 0)(None, a)

    (got,) = grad(root(lambda matvec, b: b).sum(), a)
    assert got.tolist() == [1, 1]
    (got,) = grad(root(lambda matvec, b: b).sum(), a, create_graph=True)
    assert got.tolist() == [1, 1]
    with pytest.raises(TypeError, match="must return a tuple of 1 tensors"):
        grad(root(lambda matvec, b: b[0]).sum(), a)
    with pytest.raises(ValueError, match="must return tensors like b's"):
        grad(root(lambda matvec, b: (b[0].double(),)).sum(), a)


def takes_no_right_hand_side(matvec):
    return matvec


@pytest.mark.parametrize(
    "solve",
    [ti.linear_solve.solve_cg, ti.linear_solve.solve_inv, CG, Dense, takes_no_right_hand_side],
)
def test_what_makes_a_solver_is_no_solver(solve):
    message = rf"solve must be a function of \(matvec, b\); {solve.__name__} .*solve=solve_cg\(\)"
    for decorate in (custom_root, ti.custom_fixed_point):
        with pytest.raises(TypeError, match=message):
            decorate(lambda x, a: x - a, argnums=1, solve=solve)
    with pytest.raises(TypeError, match=rf"linear_{message}"):
        type("M", (ti.nn.ImplicitMetaGradientModule,), {}, linear_solve=solve)


def test_a_solver_is_called():
    with pytest.raises(TypeError, match=r"solve must be a function of \(matvec, b\).* not a str"):
        custom_root(lambda x, a: x - a, argnums=1, solve="cg")
    custom_root(lambda x, a: x - a, argnums=1, solve=torch.linalg.solve)  # it has no signature


@pytest.mark.parametrize(
    ("argnums", "error"),
    [
        (0, ValueError),
        ((0, 1), ValueError),
        (-1, ValueError),
        ((), ValueError),
        (1.0, TypeError),
        ("a", TypeError),
        (True, TypeError),
        ((1, None), TypeError),
    ],
)
def test_argnums_that_name_no_argument(argnums, error):
    with pytest.raises(error, match="argnums"):
        custom_root(lambda x, a: x - a, argnums=argnums)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "argnums="),
        ((None, "text"), "argument 1 is a str"),
        ((None, [1.0]), "argument 1 is a list"),
        ((None, torch.ones(2, dtype=torch.long)), "without floating point tensors"),
    ],
)
def test_an_argument_in_argnums_that_has_no_tensors(arguments, message):
    solver = custom_root(lambda x, a=None: x, argnums=1)(lambda *args: torch.ones(2))
    with pytest.raises(RuntimeError, match=PREFIX + ".*" + message):
        solver(*arguments)


@pytest.mark.parametrize(
    ("output", "has_aux", "message"),
    [
        (3.0, False, "output of function solver_fn should be a torch.Tensor"),
        ((torch.ones(2), "aux"), False, "should be a torch.Tensor or a pytree"),
        ((), False, "should be a torch.Tensor or a pytree"),
        (torch.ones(2, dtype=torch.long), False, "floating point"),
        (torch.ones(2), True, r"tuple: \(output, aux\) if has_aux"),
        ((torch.ones(2), 1, 2), True, r"tuple: \(output, aux\) if has_aux"),
    ],
)
def test_an_output_that_is_no_solution(output, has_aux, message):
    solver = custom_root(lambda x, a: x, argnums=1, has_aux=has_aux)(lambda _, a: output)
    with pytest.raises(RuntimeError, match=PREFIX + ".*" + message):
        solver(None, torch.ones(2, requires_grad=True))


@pytest.mark.parametrize(
    ("optimality", "error", "message"),
    [
        (lambda x, a: (x - a,), TypeError, "structure"),
        (lambda x, a: {"x": x - a}, TypeError, "structure"),
        (lambda x, a: (x - a).sum(), ValueError, r"shape \(\) for a solution of shape \(2,\)"),
        (lambda x, a: 0.0, TypeError, "float"),
        (lambda x, a: (x - a).long(), TypeError, "int64"),
    ],
)
def test_an_optimality_that_does_not_fit_the_solution(optimality, error, message):
    a = torch.ones(2, requires_grad=True)
    solution = custom_root(optimality, argnums=1)(lambda _, a: a + 0)(None, a)
    with pytest.raises(error, match=message):
        solution.sum().backward()


def test_keywords_that_the_optimality_cannot_take():
    solver = custom_root(lambda x, a: x - a, argnums=1)(lambda _, a, **options: a + 0)
    with pytest.raises(TypeError, match=PREFIX + ".*could not be resolved.*steps"):
        solver(None, torch.ones(2), steps=3)


def test_two_solvers_decorated_alike_are_independent():
    decorate = custom_root(lambda x, a: x - 2 * a, argnums=1)
    one, two = decorate(lambda _, a: 2 * a), decorate(lambda _, a: a + a)
    a = torch.ones(1, requires_grad=True)
    got = grad(one(None, a) + two(None, a), a)
    assert got[0].item() == 4 and one.__name__ == "<lambda>"


DETACHED = {
    "detached": lambda x, a: x.detach() - a,
    "without grad": torch.no_grad()(lambda x, a: x - a),
    "constant": torch.func.grad(lambda x, a: (x * a).sum()),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which jvp calls
@pytest.mark.parametrize("solve", [None, CG(), Dense(), Neumann(), GMRES()], ids=repr)
@pytest.mark.parametrize("optimality", DETACHED.values(), ids=DETACHED.keys())
def test_an_optimality_that_does_not_depend_on_the_solution(optimality, solve):
    a = torch.ones(2, requires_grad=True)
    solver = custom_root(optimality, argnums=1, solve=solve)(lambda _, a: a + 0)
    with pytest.raises(RuntimeError, match="does not depend on its first argument"):
        solver(None, a).sum().backward()
    with pytest.raises(RuntimeError, match="does not depend on its first argument"):
        torch.func.jvp(lambda a: solver(None, a), (a.detach(),), (torch.ones(2),))


def descend(w, a):
    """Minimise |w - a^2|^2 / 2 from w by a bare backward()."""
    w = w.detach().clone().requires_grad_()
    optimiser = torch.optim.SGD([w], lr=1.0)
    with torch.enable_grad():
        (0.5 * (w - a.square()).square().sum()).backward()
    assert a.requires_grad
    optimiser.step()
    return w


@pytest.mark.parametrize("computed", [False, True])
def test_a_backward_pass_inside_the_solver_adds_to_no_gradient_outside(computed):
    leaf = torch.tensor([1.0, 3.0], requires_grad=True)
    leaf.grad = torch.ones(2)
    a = leaf.square() if computed else leaf
    x = custom_root(lambda x, a: x - a.square(), argnums=1)(descend)(a, a)
    assert leaf.grad.tolist() == [1, 1]
    x.sum().backward()  # d a^2 / d leaf = 2 leaf, or 4 leaf^3
    torch.testing.assert_close(leaf.grad, 1 + (4 * leaf**3 if computed else 2 * leaf).detach())


def test_a_leaf_of_the_initial_guess_is_the_solvers_own():
    w, a = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimiser = torch.optim.SGD([w], lr=1.0)

    def solver(given, a):
        with torch.enable_grad():
            (0.5 * (given - a).square().sum()).backward()
        optimiser.step()
        return given

    x = custom_root(lambda x, a: x - a, argnums=1)(solver)(w, a)
    assert x.tolist() == [1, 1] and a.grad is None


def test_an_optimiser_that_steps_on_a_guess_which_is_an_argument_too_is_noticed():
    a = torch.full((2,), 3.0, requires_grad=True)
    a.grad = torch.ones(2)
    optimiser = torch.optim.SGD([a], lr=1.0)

    def solver(x, a):
        optimiser.zero_grad()
        with torch.enable_grad():
            x.square().sum().backward()
        optimiser.step()
        return x

    with pytest.raises(RuntimeError, match="pass a clone of it"):
        custom_root(lambda x, a: x - a.square(), argnums=1)(solver)(a, a)
    assert a.grad.tolist() == [1, 1]


def test_a_leaf_that_is_guess_and_argument_is_one_tensor_whose_gradient_stays():
    a = torch.full((2,), 3.0, requires_grad=True)
    a.grad = torch.ones(2)

    def solver(x, given):
        assert x is a and given is a
        with torch.enable_grad():
            x.square().sum().backward()
        return given.detach() ** 2

    root = custom_root(lambda x, a: x - a.square(), argnums=1)(solver)(a, a)
    assert a.grad.tolist() == [1, 1]
    root.sum().backward()
    torch.testing.assert_close(a.grad, torch.full((2,), 7.0))


def test_a_solver_gets_parameters_as_parameters_and_a_tensor_given_twice_as_one() -> None:
    seen = []

    @custom_root(lambda x, net, tied: x - net["w"] - tied, argnums=1)
    def solver(x, net, tied):
        module = torch.nn.Linear(1, 1)
        module.weight = net["w"]  # which takes a parameter alone
        seen.append((net["w"] is net["again"], module.weight.requires_grad))
        return net["w"].detach() + tied

    w = torch.nn.Parameter(torch.ones(1, 1))
    x = solver(torch.zeros(1, 1), {"w": w, "again": w}, torch.ones(1, 1))
    assert seen == [(True, True)]
    x.sum().backward()
    assert w.grad.item() == 1
