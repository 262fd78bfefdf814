"""What TorchOpt 0.7.3 does wrong: it does so still, and we do it right."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torchopt
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tritonimplicit
from tests.integration.problems import F64, LIBRARIES, TORCH_WARNINGS, numbers
from tritonimplicit import ConvergenceWarning, Status
from tritonimplicit.linear_solve import solve_cg, solve_inv, solve_normal_cg

pytestmark = TORCH_WARNINGS
THEIR_ROOT = torchopt.diff.implicit.custom_root
OUR_ROOT = tritonimplicit.diff.implicit.custom_root
theirs = torchopt.linear_solve


def variable(*values):
    return torch.tensor(values, dtype=F64, requires_grad=True)


def square_root(custom_root, **settings):
    """x with x^2 = a, whose gradient is 1 / (2 sqrt(a))."""
    return custom_root(lambda x, a: x * x - a, argnums=1, **settings)(lambda x, a: a.sqrt())


# --- Arguments and structures ---------------------------------------------------------------------


@pytest.mark.parametrize("argnums", [2, (1, 3)])
def test_positions_other_than_the_first_ones(argnums):
    def gradients(custom_root):
        args = variable(2.0), variable(3.0), variable(4.0)
        root = custom_root(lambda x, a, b, c: x - a * b * c, argnums=argnums)
        root(lambda x, a, b, c: a * b * c)(torch.zeros(1, dtype=F64), *args).backward()
        return [None if a.grad is None else round(a.grad.item(), 12) for a in args]

    with pytest.raises(IndexError):
        gradients(THEIR_ROOT)
    assert gradients(OUR_ROOT) == ([None, 8.0, None] if argnums == 2 else [12.0, None, 6.0])


def keyword_only(custom_root):
    return custom_root(lambda x, a, *, k: x - a * k, argnums=1)(lambda x, a, *, k: a * k)


def any_keyword(custom_root):
    root = custom_root(lambda x, a, **named: x - a * named["k"], argnums=1)
    return root(lambda x, a, **named: a * named["k"])


@pytest.mark.parametrize("make", [keyword_only, any_keyword])
def test_keyword_arguments(make):
    def gradient(custom_root):
        a = variable(2.0)
        make(custom_root)(torch.zeros(1, dtype=F64), a, k=3.0).backward()
        return a.grad.item()

    with pytest.raises(TypeError):
        gradient(THEIR_ROOT)
    assert gradient(OUR_ROOT) == pytest.approx(3.0, rel=1e-12)


def test_a_dict_of_arguments_nested_with_none():
    def gradient(custom_root):
        args = {"a": variable(2.0), "rest": (variable(3.0), None)}
        root = custom_root(lambda x, args: x - args["a"] * args["rest"][0], argnums=1)
        root(lambda x, args: args["a"] * args["rest"][0])(
            torch.zeros(1, dtype=F64), args
        ).backward()
        return args["a"].grad.item(), args["rest"][0].grad.item()

    with pytest.raises(RuntimeError, match=r"should be a torch\.Tensor or a tuple"):
        gradient(THEIR_ROOT)
    assert gradient(OUR_ROOT) == pytest.approx((3.0, 2.0), rel=1e-12)


def test_a_dict_of_solutions():
    def gradient(custom_root):
        a = variable(2.0)
        root = custom_root(lambda x, a: {"x": x["x"] - a * a}, argnums=1)
        root(lambda x, a: {"x": a * a})({"x": torch.zeros(1, dtype=F64)}, a)["x"].backward()
        return a.grad.item()

    with pytest.raises(RuntimeError, match=r"should be a torch\.Tensor or a tuple"):
        gradient(THEIR_ROOT)
    assert gradient(OUR_ROOT) == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize("solver", ["solve_cg", "solve_normal_cg"])
def test_a_solution_without_dimensions(solver):
    def gradient(library):
        a = torch.tensor(4.0, dtype=F64, requires_grad=True)
        solve = getattr(library.linear_solve, solver)()
        square_root(library.diff.implicit.custom_root, solve=solve)(
            torch.ones_like(a), a
        ).backward()
        return a.grad.item()

    assert gradient(torchopt) == 0.0
    assert gradient(tritonimplicit) == pytest.approx(0.25, rel=1e-12)


# --- Linear solvers -------------------------------------------------------------------------------


def test_a_dense_solve_takes_the_whole_matrix():
    """A logistic regression with weight and bias, whose Hessian is not block diagonal."""
    x = numbers(0, 40, 3) + 1
    y = (x.sum(1) > 2.5).to(F64)

    def optimality(params, reg):
        w, b = params
        error = torch.sigmoid(x @ w + b) - y
        return x.T @ error / 40 + reg * w, error.mean().reshape(1) + reg * b

    def newton(params, reg):
        def residual(theta):
            return torch.cat(optimality((theta[:3], theta[3:]), reg))

        theta = torch.zeros(4, dtype=F64)
        for _ in range(20):
            matrix = torch.func.jacrev(residual)(theta)
            theta = theta - torch.linalg.solve(matrix, residual(theta))
        return theta[:3].clone(), theta[3:].clone()

    def gradient(custom_root, solve):
        reg = variable(0.1)
        init = torch.zeros(3, dtype=F64), torch.zeros(1, dtype=F64)
        w, b = custom_root(optimality, argnums=1, solve=solve)(newton)(init, reg)
        (w.sum() + b.sum()).backward()
        return reg.grad.item()

    right = gradient(THEIR_ROOT, theirs.solve_cg(rtol=1e-12))
    assert abs(gradient(THEIR_ROOT, theirs.solve_inv()) - right) > 0.1 * abs(right)
    assert gradient(OUR_ROOT, solve_inv()) == pytest.approx(right, rel=1e-10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_cotangent_that_is_not_finite(bad):
    def gradient(custom_root):
        a = variable(4.0, 9.0)
        cotangent = torch.tensor([bad, 1.0], dtype=F64)
        square_root(custom_root)(torch.ones(2, dtype=F64), a).backward(cotangent)
        return a.grad

    assert gradient(THEIR_ROOT).tolist() == [0.0, 0.0]
    with pytest.warns(ConvergenceWarning, match="NaN or infinity"):
        assert gradient(OUR_ROOT).isnan().all()


def test_a_gradient_that_overflows():
    """Ridge regression "solved" by a series that diverges, as in TorchOpt's test_rr_solve_inv."""

    def gradient(library):
        x, y = numbers(0, 1024, 10).float(), numbers(1, 1024).float()

        def objective(w, reg):
            return 0.5 * (x @ w - y).square().mean() + 0.5 * reg * w.square().sum()

        @library.diff.implicit.custom_root(torch.func.grad(objective), argnums=1)
        def solve(w, reg):
            series = library.linear_solve.solve_inv(ns=True, ridge=1024 * reg.item())
            return series(lambda u: x.T @ (x @ u), x.T @ y)

        reg = torch.tensor(0.5, requires_grad=True)
        (x @ solve(torch.zeros(10), reg) - y).square().mean().backward()
        return reg.grad.item()

    assert gradient(torchopt) == 0.0
    with pytest.warns(ConvergenceWarning, match="Neumann: the system diverged"):
        assert not abs(gradient(tritonimplicit)) < 1e20


def test_dot_products_that_overflow_in_half_precision():
    b = torch.full((10,), 100.0, dtype=torch.float16)
    assert theirs.solve_cg()(lambda v: 2 * v, b).tolist() == [0.0] * 10
    assert solve_cg()(lambda v: 2 * v, b).tolist() == [50.0] * 10


def test_convergence_in_bfloat16_is_judged_by_the_true_residual():
    scale, b = torch.logspace(0, 2, 32).bfloat16(), numbers(0, 32).bfloat16()
    products = 0

    def matvec(v):
        nonlocal products
        products += 1
        return scale * v

    x = theirs.solve_cg(rtol=1e-3)(matvec, b)
    residual = (b.double() - scale.double() * x.double()).norm() / b.double().norm()
    assert products < 10 * 32  # it stopped because it believed that it had converged
    assert residual > 10 * 1e-3
    solution = solve_cg(rtol=1e-3).solve(lambda v: scale * v, b)
    told = solution.residual_norm / b.double().norm()
    assert (solution.status == Status.CONVERGED) == (told <= 1e-3)
    assert told < residual


def test_a_direction_without_curvature():
    b = torch.tensor([1.0, 0.0])
    with pytest.raises(ZeroDivisionError):
        theirs.solve_cg()(lambda v: v.flip(0), b)
    assert solve_cg().solve(lambda v: v.flip(0), b).status in (Status.BREAKDOWN, Status.INDEFINITE)


def test_matrices_that_cg_cannot_solve():
    scale, b = torch.tensor([1.0, -1 + 1e-6]), torch.ones(2)
    assert theirs.solve_cg()(lambda v: scale * v, b).abs().min() > 1e4  # (1, -1) is right
    with pytest.warns(ConvergenceWarning, match="indefinite or nonsymmetric"):
        solve_cg()(lambda v: scale * v, b)
    torch.testing.assert_close(solve_normal_cg()(lambda v: scale * v, b), torch.tensor([1.0, -1.0]))


def test_a_nonsymmetric_matrix_is_not_solved_by_cg_in_silence():
    matrix, b = torch.tensor([[1.0, 5.0], [-5.0, 1.0]]), torch.tensor([1.0, 0.0])
    exact = torch.linalg.solve(matrix, b)
    assert (theirs.solve_cg()(lambda v: matrix @ v, b) - exact).norm() > 10 * exact.norm()
    with pytest.warns(ConvergenceWarning):
        solve_cg()(lambda v: matrix @ v, b)
    torch.testing.assert_close(solve_normal_cg()(lambda v: matrix @ v, b), exact)


def test_the_neumann_series_says_that_it_diverges():
    """For the root of f(z) - z, the sign of TorchOpt's documentation; f(z) = z / 2 + a."""

    def gradient(library):
        a, solve = variable(1.0), library.linear_solve.solve_inv(ns=True, maxiter=60)
        root = library.diff.implicit.custom_root(lambda z, a: z / 2 + a - z, argnums=1, solve=solve)
        root(lambda z, a: 2 * a)(torch.zeros(1, dtype=F64), a).backward()
        return a.grad.item()

    assert abs(gradient(torchopt)) > 1e10
    with pytest.warns(ConvergenceWarning, match="z - f"):
        gradient(tritonimplicit)


def test_the_neumann_series_stops_when_it_has_converged():
    with pytest.raises(TypeError, match="rtol"):
        theirs.solve_inv(ns=True, maxiter=1000, rtol=1e-6)(lambda v: 0.5 * v, torch.ones(2))
    solver = solve_inv(ns=True, maxiter=1000, rtol=1e-6)
    assert solver.solve(lambda v: 0.5 * v, torch.ones(2)).iterations < 30


def test_the_default_maxiter_counts_unknowns():
    """TorchOpt's counts the numbers of the shape: 10 * (16 + 16) for 256 unknowns."""
    scale, b = torch.logspace(0, 3.5, 256, dtype=F64).view(16, 16), torch.ones(16, 16, dtype=F64)
    x = theirs.solve_cg(rtol=1e-10)(lambda v: scale * v, b)
    assert (b - scale * x).norm() > 1e-8 * b.norm()
    solution = solve_cg(rtol=1e-10).solve(lambda v: scale * v, b)
    assert solution.iterations > 320
    assert solution.status == Status.CONVERGED


def test_a_ridge_for_each_system():
    ridge, b = torch.tensor([1.0, 3.0]), torch.ones(2, 4)
    with pytest.raises(TypeError):
        theirs.solve_cg(ridge=ridge)(lambda v: v, b)
    x = solve_cg(ridge=ridge, batch_ndim=1)(lambda v: v, b)
    torch.testing.assert_close(x, torch.tensor([[0.5], [0.25]]).expand(2, 4))


# --- Derivatives ----------------------------------------------------------------------------------


def test_second_derivatives():
    """Of sqrt(a)^3 at 4: 1.5 sqrt(a) = 3, then 0.75 / sqrt(a) = 0.375."""

    def derivatives(custom_root):
        a = variable(4.0)
        y = square_root(custom_root)(torch.ones(1, dtype=F64), a) ** 3
        (first,) = torch.autograd.grad(y, a, create_graph=True)
        (second,) = torch.autograd.grad(first, a)
        return first.item(), second.item()

    assert derivatives(THEIR_ROOT) == pytest.approx((3.0, 1.125), rel=1e-12)
    assert derivatives(OUR_ROOT) == pytest.approx((3.0, 0.375), rel=1e-12)


def test_an_argument_that_changes_before_the_backward_pass():
    """x = a^2 at 4: the gradient is 8."""

    def gradient(custom_root):
        a = variable(4.0)
        x = custom_root(lambda x, a: x - a * a, argnums=1)(lambda x, a: a * a)(
            torch.ones(1, dtype=F64), a
        )
        with torch.no_grad():
            a.add_(100)
        x.backward()
        return a.grad.item()

    assert gradient(THEIR_ROOT) == pytest.approx(208.0, rel=1e-12)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(OUR_ROOT)


FOUR, ONE = torch.full((2,), 4.0, dtype=F64), torch.ones(2, dtype=F64)
TRANSFORMS = {
    "grad": lambda fn: torch.func.grad(lambda a: fn(a).sum())(FOUR),
    "vjp": lambda fn: torch.func.vjp(fn, FOUR)[1](ONE)[0],
    "jvp": lambda fn: torch.func.jvp(fn, (FOUR,), (ONE,))[1],
    "jacrev": lambda fn: torch.func.jacrev(fn)(FOUR).sum(1),
    "jacfwd": lambda fn: torch.func.jacfwd(fn)(FOUR).sum(1),
    "vmap of grad": lambda fn: torch.func.vmap(torch.func.grad(fn))(FOUR),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    def derivative(custom_root):
        root = square_root(custom_root)
        return TRANSFORMS[transform](lambda a: root(torch.ones_like(a), a))

    with pytest.raises(RuntimeError, match="setup_context"):
        derivative(THEIR_ROOT)
    torch.testing.assert_close(derivative(OUR_ROOT), torch.full((2,), 0.25, dtype=F64))


def test_a_compiled_root():
    def gradient(root):
        def loss(a):
            return root(torch.ones_like(a), a).sum()

        a = FOUR.clone().requires_grad_()
        torch.compile(loss, fullgraph=True, backend="aot_eager")(a).backward()
        return a.grad

    with pytest.raises(torch._dynamo.exc.Unsupported):
        gradient(square_root(THEIR_ROOT))
    ours = gradient(tritonimplicit.compilable(square_root(OUR_ROOT)))
    torch.testing.assert_close(ours, torch.full((2,), 0.25, dtype=F64))


# --- What a solve costs --------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the values that the host reads, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_each_check_every_iterations():
    """TorchOpt's: for each leaf, two and then two an iteration."""
    scale = torch.logspace(0, 2, 32, dtype=F64)
    b = torch.ones(32, dtype=F64), 2 * torch.ones(32, dtype=F64)

    def reads(maxiter, solve):
        with HostReads() as reads:
            solve(maxiter)(lambda v: tuple(scale * leaf for leaf in v), b)
        return reads.count

    def growth(solve):
        return reads(24, solve) - reads(16, solve)  # over 8 iterations

    assert growth(lambda n: theirs.solve_cg(maxiter=n, rtol=0.0)) == 2 * 8 * len(b)
    assert growth(lambda n: solve_cg(maxiter=n, rtol=0.0, check_every=8)) == 1
    assert growth(lambda n: solve_cg(maxiter=n, rtol=0.0, check_every=0)) == 0


@pytest.mark.parametrize("maxiter", [4, 12])
def test_normal_cg_records_the_transpose_once(maxiter):
    """TorchOpt's takes the matvec's vjp anew in each iteration."""
    scale, b = torch.logspace(0, 2, 32, dtype=F64), torch.ones(32, dtype=F64)

    def recordings(solver):
        recorded = []

        def matvec(v):
            recorded.append(v.requires_grad)
            return scale * v

        solver(matvec, b)
        return sum(recorded)

    assert recordings(theirs.solve_normal_cg(maxiter=maxiter, rtol=0.0)) > maxiter
    assert recordings(solve_normal_cg(maxiter=maxiter, rtol=0.0)) == 1


# --- ImplicitMetaGradientModule -------------------------------------------------------------------


def make_class(library):
    class Adapted(library.nn.ImplicitMetaGradientModule):
        """w near the meta-module's weight and x: w = (weight + x) / 2."""

        def __init__(self, meta):
            super().__init__()
            self.meta = meta
            self.w = nn.Parameter(torch.zeros(1, 3))
            self.v = nn.Parameter(torch.zeros(1))

        def objective(self, x):
            near = (self.w - self.meta.weight).square().sum() + (self.w - x).square().sum()
            return near + self.v.square().sum()

        def solve(self, x):
            params = tuple(self.parameters())
            optimizer = torch.optim.SGD(params, lr=0.25)
            with torch.enable_grad():
                for _ in range(30):
                    optimizer.zero_grad()
                    self.objective(x).backward(inputs=params)
                    optimizer.step()
            return self

    return Adapted


def weight_gradient(module):
    (gradient,) = torch.autograd.grad(module.w.sum(), module.meta.weight)
    return gradient


HALF = torch.full((1, 3), 0.5)


def test_module_arguments_by_keyword():
    def solved(library):
        return make_class(library)(nn.Linear(3, 1)).solve(x=torch.ones(3))

    with pytest.raises(TypeError):
        weight_gradient(solved(torchopt))
    torch.testing.assert_close(weight_gradient(solved(tritonimplicit)), HALF)


def test_modules_do_not_outlive_their_use():
    def survivors(library):
        cls, meta, alive = make_class(library), nn.Linear(3, 1), []
        for _ in range(3):
            alive.append(weakref.ref(cls(meta).solve(torch.ones(3))))
        gc.collect()
        return sum(ref() is not None for ref in alive)

    assert survivors(torchopt) == 3
    assert survivors(tritonimplicit) == 0


def test_a_second_solve():
    def solved(library):
        module = make_class(library)(nn.Linear(3, 1))
        return module.solve(torch.ones(3)).solve(torch.zeros(3))

    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        solved(torchopt)
    torch.testing.assert_close(weight_gradient(solved(tritonimplicit)), HALF)


def test_a_subclass_that_inherits_solve():
    with pytest.raises(TypeError, match="already enabled"):
        type("Child", (make_class(torchopt),), {})
    child = type("Child", (make_class(tritonimplicit),), {})
    torch.testing.assert_close(weight_gradient(child(nn.Linear(3, 1)).solve(torch.ones(3))), HALF)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_meta_module_in_evaluation_mode(name):
    """It is meta in neither library by being an argument; it can be declared so in both."""

    class Declared(make_class(LIBRARIES[name])):
        def __init__(self, meta):
            super().__init__(None)
            del self.meta
            self.register_meta_module("meta", meta)

        def solve(self, x):
            return self

    meta = nn.Linear(3, 1).eval()
    assert not list(make_class(LIBRARIES[name])(meta).meta_parameters())
    assert len(list(Declared(meta).meta_parameters())) == 2


def test_to_moves_meta_parameters():
    def dtypes(library):
        class Module(make_class(library)):
            def __init__(self, reg):
                super().__init__(None)
                self.reg = reg

            def solve(self, x):
                return self

        module = Module(torch.ones(1, requires_grad=True)).double()
        return module.w.dtype, module.reg.dtype

    assert dtypes(torchopt) == (F64, torch.float32)
    assert dtypes(tritonimplicit) == (F64, F64)
