"""ImplicitMetaGradientModule: gradients against closed forms in float64; life around `solve`."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import re
import weakref

import pytest
import torch
from torch import Tensor, nn

from tritonimplicit import SGD, module_clone
from tritonimplicit.diff.implicit.nn.module import (
    enable_implicit_gradients,
    make_optimality_from_objective,
)
from tritonimplicit.linear_solve import solve_cg, solve_inv, solve_normal_cg
from tritonimplicit.nn import ImplicitMetaGradientModule

N, SAMPLES = 5, 20
EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, N, generator=generator, dtype=torch.float64)
    return x, torch.randn(SAMPLES, generator=generator, dtype=torch.float64)


@pytest.fixture
def reg() -> Tensor:
    return torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


def ridge_solution(x: Tensor, y: Tensor, reg: Tensor) -> Tensor:
    """The minimiser of mean((x w - y)^2) / 2 + reg |w|^2 / 2, differentiable in reg."""
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(x.T @ x / len(x) + reg * identity, x.T @ y / len(x))


def outer(w: Tensor) -> Tensor:
    """A loss whose gradient and curvature in w are neither zero nor constant."""
    return w.sin().sum() + (w**3).sum()


def expected_gradient(x: Tensor, y: Tensor, reg: Tensor) -> Tensor:
    return torch.autograd.grad(outer(ridge_solution(x, y, reg)), reg)[0]


def assert_exact(actual: Tensor, expected: Tensor, x: Tensor, reg: Tensor) -> None:
    """Equal up to the rounding of two solves with the ridge matrix: 2 cond n eps, of the norm."""
    singular = torch.linalg.svdvals(x) ** 2 / len(x) + reg.detach()
    bound = 4 * float(singular[0] / singular[-1]) * N * EPS * float(expected.detach().norm())
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


class Ridge(ImplicitMetaGradientModule, linear_solve=solve_inv()):
    def __init__(self, reg: Tensor) -> None:
        super().__init__()
        self.reg = reg
        self.w = nn.Parameter(torch.zeros(N, dtype=torch.float64))

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x @ self.w - y).square().mean() + 0.5 * self.reg * self.w.square().sum()

    def solve(self, x: Tensor, y: Tensor) -> Ridge:
        self.w.copy_(ridge_solution(x, y, self.reg))
        return self


class RidgeByOptimality(ImplicitMetaGradientModule, linear_solve=solve_inv()):
    def __init__(self, reg: Tensor) -> None:
        super().__init__()
        self.reg = reg
        self.w = nn.Parameter(torch.zeros(N, dtype=torch.float64))

    def optimality(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (x.T @ (x @ self.w - y) / len(x) + self.reg * self.w,)

    def solve(self, x: Tensor, y: Tensor) -> None:
        self.w.copy_(ridge_solution(x, y, self.reg))


class Affine(ImplicitMetaGradientModule, linear_solve=solve_inv()):
    """iMAML on an affine model: a parameter for each of several meta-parameters."""

    def __init__(self, meta_net: nn.Linear) -> None:
        super().__init__()
        self.meta_net = meta_net
        self.net = module_clone(meta_net, by="deepcopy")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.parameters(), self.meta_parameters(), strict=True)
        return 0.5 * (self(x) - y).square().mean() + 0.5 * sum(
            (p - m).square().sum() for p, m in pairs
        )

    def solve(self, x: Tensor, y: Tensor) -> Affine:
        params = tuple(p for p in self.parameters() if p.requires_grad)
        with torch.enable_grad():  # Newton's method: exact on a quadratic, after one step
            flat = torch.cat([p.flatten() for p in params])
            sizes = [p.numel() for p in params]
            gradient = torch.autograd.grad(self.objective(x, y), params, create_graph=True)
            gradient = torch.cat([g.flatten() for g in gradient])
            rows = [
                torch.cat([r.flatten() for r in torch.autograd.grad(g, params, retain_graph=True)])
                for g in gradient
            ]
        flat = flat - torch.linalg.solve(torch.stack(rows), gradient)
        for p, value in zip(params, flat.split(sizes), strict=True):
            p.copy_(value.view_as(p))
        return self


def affine_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the mean prediction, H^-1 g: the penalty makes d solution / d meta = H^-1."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    hessian = design.T @ design / len(x) + torch.eye(N + 1, dtype=x.dtype)
    u = torch.linalg.solve(hessian, design.mean(0))
    return u[:N].view(1, N), u[N:]


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Ridge, RidgeByOptimality])
def test_gradient_is_that_of_the_closed_form(cls, data, reg):
    module = cls(reg)
    module.solve(*data)
    torch.testing.assert_close(module.w, ridge_solution(*data, reg), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(outer(module.w), reg)
    assert_exact(gradient, expected_gradient(*data, reg), data[0], reg)


@pytest.mark.parametrize("linear_solve", [solve_cg(rtol=1e-12), solve_normal_cg(rtol=1e-12)])
def test_gradient_by_iterative_solvers(linear_solve, data, reg):
    class Module(Ridge, linear_solve=linear_solve):
        pass

    (gradient,) = torch.autograd.grad(outer(Module(reg).solve(*data).w), reg)
    assert_within_solver_tolerance(gradient, 1e-12, data, reg)


def test_linear_solve_is_custom_roots_if_none_is_given(data, reg):
    class Module(ImplicitMetaGradientModule):
        def __init__(self, reg):
            super().__init__()
            self.reg = reg
            self.w = nn.Parameter(torch.zeros(N, dtype=torch.float64))

        objective = Ridge.objective
        solve = Ridge.solve.__wrapped__

    assert Module.linear_solve is None
    (gradient,) = torch.autograd.grad(outer(Module(reg).solve(*data).w), reg)
    assert_within_solver_tolerance(gradient, solve_normal_cg().rtol, data, reg)


def assert_within_solver_tolerance(gradient, rtol, data, reg):
    """Equal up to |u - u*| |w|, where |u - u*| <= rtol |A^T b| / min eigenvalue of A^T A."""
    w = ridge_solution(*data, reg.detach()).requires_grad_()
    (b,) = torch.autograd.grad(outer(w), w)
    eigenvalues = torch.linalg.svdvals(data[0]) ** 2 / SAMPLES + reg.detach()
    bound = rtol * eigenvalues[0] / eigenvalues[-1] ** 2 * b.norm() * w.detach().norm()
    torch.testing.assert_close(
        gradient, expected_gradient(*data, reg), rtol=1e-14, atol=float(bound)
    )


def test_several_parameters_and_meta_parameters(data):
    meta_net = nn.Linear(N, 1, dtype=torch.float64)
    solved = Affine(meta_net).solve(*data)
    gradients = torch.autograd.grad(solved(data[0]).mean(), tuple(meta_net.parameters()))
    for gradient, expected in zip(gradients, affine_gradient(data[0]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-14)


def test_second_order_after_the_module_is_gone(data, reg):
    def gradient() -> Tensor:
        return torch.autograd.grad(outer(Ridge(reg).solve(*data).w), reg, create_graph=True)[0]

    first = gradient()
    gc.collect()
    (second,) = torch.autograd.grad(first, reg)
    loss = outer(ridge_solution(*data, reg))
    (expected,) = torch.autograd.grad(loss, reg, create_graph=True)
    (expected,) = torch.autograd.grad(expected, reg)
    torch.testing.assert_close(second, expected, rtol=1e-12, atol=0)


def test_arguments_by_keyword(data, reg):
    class Module(Ridge):
        def objective(self, x, *, y, scale=2.0):
            return scale * super().objective(x, y)

        def solve(self, x, *, y, **options):
            assert options == {"scale": 3.0}
            self.w.copy_(ridge_solution(x, y, self.reg))
            return self

    x, y = data
    (gradient,) = torch.autograd.grad(outer(Module(reg).solve(x, y=y, scale=3.0).w), reg)
    assert_exact(gradient, expected_gradient(x, y, reg), x, reg)


def test_frozen_parameters_are_constants(data):
    x, y = data
    meta_net = nn.Linear(N, 1, dtype=torch.float64)
    module = Affine(meta_net)
    module.net.bias.requires_grad_(False)
    bias = module.net.bias.clone()
    module.solve(x, y)
    assert torch.equal(module.net.bias, bias)
    gradients = torch.autograd.grad(
        module(x).mean(), tuple(meta_net.parameters()), allow_unused=True
    )
    hessian = x.T @ x / SAMPLES + torch.eye(N, dtype=x.dtype)
    expected = torch.linalg.solve(hessian, x.mean(0)).view(1, N)
    torch.testing.assert_close(gradients[0], expected, rtol=1e-13, atol=1e-14)
    assert gradients[1] is None or not gradients[1].any()


def test_tied_parameters(data, reg):
    class Tied(Ridge):
        def __init__(self, reg):
            super().__init__(reg)
            self.child = nn.Module()
            self.child.alias = self.w

        def objective(self, x, y):
            w = (self.w + self.child.alias) / 2
            return 0.5 * (x @ w - y).square().mean() + 0.5 * self.reg * w.square().sum()

    module = Tied(reg).solve(*data)
    assert module.child.alias is module.w
    (gradient,) = torch.autograd.grad(outer(module.child.alias), reg)
    assert_exact(gradient, expected_gradient(*data, reg), data[0], reg)


@pytest.mark.parametrize("way", ["list", "method", "partial", "closure"])
def test_parameters_reached_by_indirect_references(way, data, reg):
    class Module(Ridge):
        def __init__(self, reg):
            super().__init__(reg)
            self.layer = nn.Linear(N, 1, bias=False, dtype=torch.float64)
            del self.w
            if way == "list":
                layers = [self.layer]
                self.layers = {"only": layers}
            elif way == "method":
                self.predict = self.layer.forward
            elif way == "partial":
                self.predict = functools.partial(nn.Linear.forward, self.layer)
            else:
                self.predict = lambda x: self.layer(x)

        @property
        def w(self):
            return self.layer.weight[0]

        def objective(self, x, y):
            predict = self.layers["only"][0] if way == "list" else self.predict
            w = self.w
            return 0.5 * (predict(x)[:, 0] - y).square().mean() + 0.5 * self.reg * (w @ w)

        def solve(self, x, y):
            self.layer.weight.copy_(ridge_solution(x, y, self.reg)[None])
            return self

    (gradient,) = torch.autograd.grad(outer(Module(reg).solve(*data).w), reg)
    assert_exact(gradient, expected_gradient(*data, reg), data[0], reg)


# --- life around solve ----------------------------------------------------------------------------


def test_a_second_solve_leaves_the_first_graph_intact(data, reg):
    x, y = data
    module = Ridge(reg)
    first = outer(module.solve(x, y).w)
    second = outer(module.solve(x, -2 * y).w)
    (gradient,) = torch.autograd.grad(first + second, reg)
    expected = expected_gradient(x, y, reg) + expected_gradient(x, -2 * y, reg)
    assert_exact(gradient, expected, x, reg)


def test_a_second_solve_starts_where_the_first_ended(data, reg):
    class Descent(Ridge):
        def __init__(self, reg):
            super().__init__(reg)
            self.optimizer = SGD(self.parameters(), lr=0.2)  # knows the tensors of this moment

        def solve(self, x, y, steps):
            with torch.enable_grad():
                for _ in range(steps):
                    self.optimizer.zero_grad()
                    self.objective(x, y).backward(inputs=tuple(self.parameters()))
                    self.optimizer.step()
            return self

        def objective(self, x, y, steps=0):
            return super().objective(x, y)

    once, twice = Descent(reg).solve(*data, 20), Descent(reg)
    twice.solve(*data, 10).solve(*data, steps=10)
    assert torch.equal(once.w, twice.w)
    assert twice.w.grad_fn is not None
    twice.load_state_dict(Descent(reg).state_dict())  # or where it was put since
    assert torch.equal(once.w, twice.solve(*data, 20).w)


def test_parameters_can_be_detached_in_place(data, reg):
    module = Ridge(reg).solve(*data)
    for p in module.parameters():
        p.detach_().requires_grad_()
    assert module.w.is_leaf
    assert module.w.requires_grad
    module.w.sum().backward()
    assert torch.equal(module.w.grad, torch.ones_like(module.w))
    (gradient,) = torch.autograd.grad(outer(module.solve(*data).w), reg)
    assert_exact(gradient, expected_gradient(*data, reg), data[0], reg)


def test_meta_parameters_changed_before_backward_are_an_error(data, reg):
    loss = outer(Ridge(reg).solve(*data).w)
    with torch.no_grad():
        reg.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, reg)


def test_the_state_that_solve_leaves_counts(data, reg):
    class Module(Ridge):
        scale = float("nan")

        def objective(self, x, y):
            return super().objective(x, y) * self.scale

        def solve(self, x, y):
            self.scale = 2.0
            return super().solve(x, y)

    module = Module(reg).solve(*data)
    module.scale = float("nan")
    (gradient,) = torch.autograd.grad(outer(module.w), reg)
    assert_exact(gradient, expected_gradient(*data, reg), data[0], reg)


def test_no_grad_only_solves(data, reg):
    module = Ridge(reg)
    w = module.w
    with torch.no_grad():
        assert module.solve(*data) is module
    assert module.w is w
    assert module.w.is_leaf
    assert torch.equal(module.w, ridge_solution(*data, reg))


def test_what_solve_returns_is_passed_through(data, reg):
    class Module(Ridge):
        def solve(self, x, y):
            super().solve(x, y)
            return {"steps": 3}, None

    assert Module(reg).solve(*data) == ({"steps": 3}, None)


@pytest.mark.parametrize("grad", [False, True])
def test_solve_may_call_the_parents(grad, data, reg):
    class Module(Ridge):
        def solve(self, x, y):
            with torch.set_grad_enabled(grad):
                return super().solve(x, y)

    module = Module(reg)
    leaf = module.w
    for _ in range(2):
        (gradient,) = torch.autograd.grad(outer(module.solve(*data).w), reg)
        assert_exact(gradient, expected_gradient(*data, reg), data[0], reg)
    with torch.no_grad():
        assert module.solve(*data).w is leaf


def test_solves_leak_nothing(data, reg):
    def live_modules() -> int:
        return sum(issubclass(type(o), nn.Module) for o in gc.get_objects())

    def run(backward: bool) -> weakref.ref[nn.Module]:
        meta_net = nn.Linear(N, 1, dtype=torch.float64)
        module = Affine(meta_net)  # two parameters: their graph node has two owners
        module.last = outer(module.solve(*data)(data[0]))
        if backward:
            torch.autograd.grad(module.last, tuple(meta_net.parameters()))
        return weakref.ref(module)

    run(True)
    gc.collect()
    before = live_modules()
    references = [run(backward=i % 2 == 0) for i in range(50)]
    gc.collect()
    assert not any(reference() for reference in references)
    assert live_modules() == before


def test_repeated_solves_of_one_module_keep_nothing_old(data, reg):
    module = Ridge(reg)
    solutions = []
    for _ in range(5):
        module.loss = outer(module.solve(*data).w)  # an attribute with a graph
        solutions.append(weakref.ref(module.w))
    assert [name for name, _ in module.named_parameters()] == ["w"]
    gc.collect()
    assert [s() is not None for s in solutions] == [False] * 4 + [True]


def test_an_error_in_solve_leaves_the_module_usable(data, reg):
    class Module(Ridge):
        def solve(self, x, y):
            if y.isnan().any():
                raise ArithmeticError("no data")
            return super().solve(x, y)

    x, y = data
    module = Module(reg).solve(x, y)
    with pytest.raises(ArithmeticError, match="no data"):
        module.solve(x, y * torch.nan)
    (gradient,) = torch.autograd.grad(outer(module.solve(x, y).w), reg)
    assert_exact(gradient, expected_gradient(x, y, reg), x, reg)


# --- moving, saving, copying ----------------------------------------------------------------------


@pytest.mark.parametrize("solved", [False, True])
def test_to_moves_parameters_and_meta_parameters(solved, data, reg):
    module = Ridge(reg)
    if solved:
        module.solve(*data)
    assert module.to(torch.float32) is module
    assert module.reg is reg  # in place, as torch moves parameters
    assert {t.dtype for t in (module.w, reg)} == {torch.float32}
    x, y = (t.float() for t in data)
    (gradient,) = torch.autograd.grad(outer(module.solve(x, y).w), reg)
    expected = expected_gradient(*data, reg.detach().double().requires_grad_())
    singular = torch.linalg.svdvals(data[0]) ** 2 / SAMPLES + 0.3
    rtol = 8 * float(singular[0] / singular[-1]) * N * torch.finfo(torch.float32).eps
    torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=0)


def test_to_keeps_the_gradient_of_a_computed_meta_parameter(data):
    log_reg = torch.tensor(-1.2, dtype=torch.float64, requires_grad=True)
    module = Ridge(log_reg.exp()).to(torch.float32)
    assert module.reg.dtype == torch.float32
    x, y = (t.float() for t in data)
    (gradient,) = torch.autograd.grad(outer(module.solve(x, y).w), log_reg)
    loss = outer(ridge_solution(*data, log_reg.exp()))
    (expected,) = torch.autograd.grad(loss, log_reg)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=0)


def test_to_keeps_the_graph_of_a_solution(data, reg):
    module = Ridge(reg.log().exp()).solve(*data)
    w = module.w
    assert module.to(torch.float64).w is w
    (gradient,) = torch.autograd.grad(outer(module.to(torch.float32).w), reg)
    assert module.w.dtype == torch.float32
    assert gradient.dtype == torch.float64
    expected = expected_gradient(*data, reg)
    torch.testing.assert_close(gradient, expected, rtol=20 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.gpu
def test_to_device_moves_meta_modules(data):
    meta_net = nn.Linear(N, 1, dtype=torch.float64)
    module = Affine(meta_net).to("cuda")
    x, y = (t.cuda() for t in data)
    assert meta_net.weight.is_cuda
    gradients = torch.autograd.grad(module.solve(x, y)(x).mean(), tuple(meta_net.parameters()))
    for gradient, expected in zip(gradients, affine_gradient(data[0]), strict=True):
        torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-13, atol=1e-14)


def test_state_dict_holds_parameters_and_no_meta_parameters(data, reg):
    module = Ridge(reg).solve(*data)
    state = copy.deepcopy(module.state_dict())
    assert set(state) == {"w"}
    other = Ridge(reg)
    other.load_state_dict(state)
    assert torch.equal(other.w, module.w)


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES.keys())
@pytest.mark.parametrize("solved", [False, True])
def test_copies_have_parameters_and_meta_parameters_of_their_own(duplicate, solved, data, reg):
    module = Ridge(reg)
    if solved:
        module.solve(*data)
    before = module.w.detach().clone()
    other = duplicate(module)
    assert other.reg is not reg
    assert [name for name, _ in other.named_meta_parameters()] == ["reg"]
    assert isinstance(other.w, nn.Parameter)
    assert torch.equal(other.w, before)
    x, y = data
    (gradient,) = torch.autograd.grad(outer(other.solve(x, 2 * y).w), other.reg)
    assert_exact(gradient, expected_gradient(x, 2 * y, reg), x, reg)
    assert torch.equal(module.w, before)
    if solved:
        (gradient,) = torch.autograd.grad(outer(module.w), reg)
        assert_exact(gradient, expected_gradient(x, y, reg), x, reg)


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES.keys())
def test_an_optimiser_of_a_solved_module_is_copied_with_it(duplicate, data):
    module = Affine(nn.Linear(N, 1, dtype=torch.float64))
    module.optimizer = SGD(module.parameters(), lr=0.1)
    other = duplicate(nn.Sequential(module.solve(*data)))[0]
    (group,) = other.optimizer.param_groups
    assert all(p is q for p, q in zip(group["params"], other.parameters(), strict=True))


# --- what is meta ---------------------------------------------------------------------------------


class Bare(ImplicitMetaGradientModule):
    def __init__(self, *args, **kwargs):
        super().__init__()

    def objective(self):
        return torch.tensor(0.0)

    def solve(self):
        pass


def test_constructor_arguments_become_meta(reg):
    net, frozen = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2).eval()
    constant = torch.zeros(3)
    module = Bare({"reg": [reg]}, constant, net, frozen=frozen)
    module.reg, module.constant, module.net, module.frozen = reg, constant, net, frozen
    module.inner, module.own = net[0], nn.Linear(1, 1)
    module.free = torch.ones(2, requires_grad=True)
    named = dict(module.named_meta_parameters())
    assert list(named) == ["reg", "net.0.weight", "net.0.bias"]
    assert named["reg"] is reg
    assert module.inner is net[0]
    assert [name for name, _ in module.named_parameters()] == [
        "free",
        "frozen.weight",
        "frozen.bias",
        "own.weight",
        "own.bias",
    ]
    assert list(module.named_meta_children()) == [("net", net), ("inner", net[0])]
    assert list(module.meta_children()) == [net, net[0]]
    assert list(module.named_meta_modules()) == [("net", net), ("net.0", net[0])]  # each once
    assert list(module.meta_modules()) == [net, net[0]]
    assert [n for n, _ in module.named_meta_parameters("a", recurse=False)] == ["a.reg"]
    assert list(module.meta_parameters(recurse=False)) == [reg]
    assert {"reg", "net"} <= set(dir(module))


def test_a_module_in_evaluation_mode_is_declared_meta(data):
    meta_net = nn.Linear(N, 1, dtype=torch.float64).eval()

    class Declared(Affine):
        def __init__(self, meta_net):
            ImplicitMetaGradientModule.__init__(self)
            self.register_meta_module("meta_net", meta_net)
            self.net = module_clone(meta_net, by="deepcopy")

    module = Declared(meta_net)
    assert list(module.meta_parameters()) == list(meta_net.parameters())
    gradients = torch.autograd.grad(
        module.solve(*data)(data[0]).mean(), tuple(meta_net.parameters())
    )
    for gradient, expected in zip(gradients, affine_gradient(data[0]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-14)


def test_meta_names_stay_meta_and_can_be_deleted(reg):
    module = Bare(reg)
    module.reg = reg
    module.reg = other = torch.ones(2, requires_grad=True)
    assert list(module.meta_parameters()) == [other]
    assert not list(module.parameters())
    with pytest.raises(TypeError, match=re.escape("cannot assign 'int' to the meta name 'reg'")):
        module.reg = 1
    module.reg = None
    assert module.reg is None
    del module.reg
    assert not hasattr(module, "reg")
    module.reg = reg
    assert module.reg is reg


def test_parameters_assigned_anew_keep_their_order(reg):
    module = Bare(reg)
    module.a, module.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
    module.a = torch.zeros(3, requires_grad=True)
    assert [name for name, _ in module.named_parameters()] == ["a", "b"]
    module.a = reg  # what is meta is meta under any name
    assert [name for name, _ in module.named_parameters()] == ["b"]
    assert [name for name, _ in module.named_meta_parameters()] == ["a"]


def test_register_meta_parameter_checks_its_arguments(reg):
    module = Bare()
    module.register_buffer("taken", torch.zeros(1))
    for name in ("a.b", "", "taken"):
        with pytest.raises(KeyError):
            module.register_meta_parameter(name, reg)
        with pytest.raises(KeyError):
            module.register_meta_module(name, nn.Linear(1, 1))
    with pytest.raises(TypeError, match="name should be a string"):
        module.register_meta_parameter(b"x", reg)
    with pytest.raises(TypeError, match="name should be a string"):
        module.add_meta_module(1, nn.Linear(1, 1))
    with pytest.raises(TypeError, match="cannot assign 'float' object to meta-parameter 'x'"):
        module.register_meta_parameter("x", 1.0)
    with pytest.raises(TypeError, match="is not a Module subclass"):
        module.add_meta_module("x", torch.zeros(1))
    with pytest.raises(ValueError, match="meta-parameter 'x' must be a tensor that requires grad"):
        module.register_meta_parameter("x", torch.zeros(1))
    module.register_meta_parameter("x", None)
    assert module.x is None
    assert not list(module.meta_parameters())


def test_register_parameter_takes_tensors_that_require_grad(reg):
    module = Bare(reg, net := nn.Linear(1, 1))
    module.register_parameter("x", value := torch.ones(1, requires_grad=True))
    assert module.x is value
    with pytest.raises(ValueError, match="parameter 'y' must be a tensor that requires grad"):
        module.register_parameter("y", torch.ones(1))
    with pytest.raises(ValueError, match="parameter 'y' is meta"):
        module.register_parameter("y", reg)
    with pytest.raises(ValueError, match="module 'y' is meta"):
        module.register_module("y", net)
    with pytest.raises(KeyError):
        module.register_parameter("a.b", value)
    assert list(module.parameters()) == [value]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(1, requires_grad=True), "cannot assign parameters before Module.__init__()"),
        (nn.Linear(1, 1), "cannot assign module before Module.__init__()"),
    ],
)
def test_super_init_comes_first(value, message):
    class Module(Bare):
        def __init__(self, value):
            self.value = value

    with pytest.raises(AttributeError, match=re.escape(message)):
        Module(value)


# --- misuse ---------------------------------------------------------------------------------------


def test_modules_without_parameters_or_meta_parameters(reg):
    module = Bare()
    module.w = nn.Parameter(torch.zeros(1))
    for method in (module.solve, module.optimality):
        with pytest.raises(RuntimeError, match=re.escape("The module has no meta-parameters.")):
            method()
    module = Bare(reg)
    module.reg = reg
    for method in (module.solve, module.optimality):
        with pytest.raises(RuntimeError, match=re.escape("The module has no parameters.")):
            method()
    module.w = nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(RuntimeError, match="The module has no parameters that require grad"):
        module.solve()


def test_parameters_that_are_meta_parameters_too():
    class Module(Affine):
        def __init__(self, meta_net):
            ImplicitMetaGradientModule.__init__(self)
            self.meta_net = meta_net
            self.net = module_clone(meta_net)  # by reference

    module = Module(nn.Linear(N, 1))
    with pytest.raises(RuntimeError, match=r"meta-parameters as well: net\.weight, net\.bias\."):
        module.solve(torch.zeros(1, N), torch.zeros(1))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_submodule_is_refused(data):
    module = Affine(nn.Linear(N, 1, dtype=torch.float64))
    module.net = torch.jit.script(module.net)
    with pytest.raises(TypeError, match="scripted submodule"):
        module.solve(*data)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (lambda w: w, TypeError, "must return a tuple of tensors, not a Tensor"),
        (lambda w: (w, w), ValueError, "1 for w; it returned 2"),
        (lambda w: (None,), TypeError, "returned a NoneType for parameter 'w'"),
        (lambda w: (w[1:],), ValueError, r"shape \(4,\) for parameter 'w' of shape \(5,\)"),
    ],
)
def test_an_optimality_that_does_not_fit(residual, error, message, data, reg):
    class Module(RidgeByOptimality):
        def optimality(self, x, y):
            return residual(self.w * self.reg)

    module = Module(reg)
    module.solve(*data)
    with pytest.raises(error, match=message):
        module.w.sum().backward()


@pytest.mark.parametrize("value", [torch.ones(2), 1.0])
def test_an_objective_that_is_no_scalar_tensor(value, data, reg):
    class Module(Ridge):
        def objective(self, x, y):
            return value

    with pytest.raises(TypeError, match=r"Module.objective\(\) must return a tensor without dim"):
        Module(reg).optimality(*data)


def test_solve_that_removes_a_parameter(data, reg):
    class Module(Ridge):
        def solve(self, x, y):
            del self.w

    with pytest.raises(RuntimeError, match=r"solve\(\) removed parameters of the module: w"):
        Module(reg).solve(*data)


def test_implicit_gradients_are_enabled_once():
    message = "Implicit gradients are already enabled for the `solve` method."
    with pytest.raises(TypeError, match=re.escape(message)):
        enable_implicit_gradients(Ridge)
    with pytest.raises(TypeError, match=re.escape("The objective function is not defined.")):
        make_optimality_from_objective(RidgeByOptimality)


def test_a_class_without_solve_is_abstract():
    class Module(ImplicitMetaGradientModule):
        def objective(self):
            return torch.tensor(0.0)

    with pytest.raises(TypeError, match="Can't instantiate abstract class"):
        Module()


def test_a_class_needs_optimality_or_objective():
    message = "ImplicitMetaGradientModule requires either an optimality() method or an objective()"
    with pytest.raises(TypeError, match=re.escape(message)):
        type("Module", (ImplicitMetaGradientModule,), {"solve": lambda self: self})


@pytest.mark.parametrize("name", ["optimality", "objective"])
@pytest.mark.parametrize(
    ("member", "message"),
    [
        (staticmethod(lambda: None), "must not be a staticmethod."),
        (classmethod(lambda cls: None), "must not be a classmethod."),
        (0, "must be callable."),
    ],
)
def test_optimality_and_objective_must_be_methods(name, member, message):
    with pytest.raises(TypeError, match=re.escape(f"method {name}() {message}")):
        type("Module", (ImplicitMetaGradientModule,), {name: member, "solve": lambda self: self})
    if name == "objective":  # in a class whose parent derives its optimality
        with pytest.raises(TypeError, match=re.escape(f"method {name}() {message}")):
            type("Module", (Ridge,), {name: member})


def test_linear_solve_is_inherited_and_replaced(data, reg):
    calls = []

    def counting(matvec, b):
        calls.append(b)
        return solve_inv()(matvec, b)

    class Parent(Ridge, linear_solve=counting):
        pass

    class Child(Parent):  # neither `solve` nor `linear_solve`
        pass

    class Other(Child, linear_solve=solve_cg()):
        pass

    for cls, count in ((Parent, 1), (Child, 2), (Other, 2)):
        torch.autograd.grad(outer(cls(reg).solve(*data).w), reg)
        assert len(calls) == count
    assert all(isinstance(b, tuple) for b in calls)
    with pytest.raises(TypeError, match="linear_solve must be a function"):
        type("Module", (Ridge,), {}, linear_solve=1)


def test_solve_of_a_mixin(data, reg):
    class Mixin:
        solve = Ridge.solve.__wrapped__

    class Module(Mixin, RidgeByOptimality):
        pass

    (gradient,) = torch.autograd.grad(outer(Module(reg).solve(*data).w), reg)
    assert_exact(gradient, expected_gradient(*data, reg), data[0], reg)


def test_an_objective_that_does_not_depend_on_the_parameters(reg):
    class Detached(ImplicitMetaGradientModule):
        def __init__(self, reg):
            super().__init__()
            self.reg, self.w = reg, nn.Parameter(torch.zeros(N, dtype=torch.float64))

        def objective(self):
            return (self.w.detach() * self.reg).square().sum()

        def solve(self):
            return self

    with pytest.raises(RuntimeError, match="does not depend on its first argument"):
        outer(Detached(reg).solve().w).backward()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_backward_pass_inside_solve_adds_nothing_outside(data, reg, enabled):
    class Bare(ImplicitMetaGradientModule, linear_solve=solve_inv()):
        def __init__(self, reg):
            super().__init__()
            self.reg, self.w = reg, nn.Parameter(torch.zeros(N, dtype=torch.float64))

        def objective(self, x, y):
            return 0.5 * (x @ self.w - y).square().mean() + 0.5 * self.reg * self.w.square().sum()

        def solve(self, x, y):
            with torch.enable_grad():
                self.objective(x, y).backward()
            assert self.reg.grad is not None
            self.w.copy_(ridge_solution(x, y, self.reg))
            return self

    module, before = Bare(reg), torch.tensor(7.0, dtype=torch.float64)
    reg.grad = before
    x = data[0].clone().requires_grad_()  # an argument
    with torch.set_grad_enabled(enabled):
        module.solve(x, data[1])
    assert reg.grad is before and before == 7 and x.grad is None
    if enabled:
        got = torch.autograd.grad(outer(module.w), reg)[0]
        assert_exact(got, expected_gradient(*data, reg), data[0], reg)
