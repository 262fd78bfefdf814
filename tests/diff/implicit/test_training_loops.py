"""What training loops do around a solver: autocast, scaling, checkpoints, optimisers, copies."""

import gc
import resource

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import tritonimplicit as ti
from tritonimplicit import custom_fixed_point, custom_root
from tritonimplicit.linear_solve import Dense, solve_inv
from tritonimplicit.nn import ImplicitMetaGradientModule

DOUBLE = torch.float64
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Cell(nn.Module):
    """z -> tanh(W z + U x), a contraction."""

    def __init__(self, n=8, dtype=torch.float32):
        super().__init__()
        self.w, self.u = nn.Linear(n, n, dtype=dtype), nn.Linear(n, n, dtype=dtype)
        with torch.no_grad():
            self.w.weight.mul_(0.5 / torch.linalg.matrix_norm(self.w.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.w(z) + self.u(x))


class Equilibrium(nn.Module):
    """A deep equilibrium model in a few lines."""

    def __init__(self, solve, n=8, dtype=torch.float32, steps=60):
        super().__init__()
        self.cell, self.steps = Cell(n, dtype), steps
        self.solver = custom_fixed_point(self.apply_cell, argnums=(1, 2), solve=solve)(self.iterate)

    def apply_cell(self, z, weights, x):
        return functional_call(self.cell, weights, (z, x))

    def iterate(self, z, weights, x):
        for _ in range(self.steps):
            z = self.apply_cell(z, weights, x)
        return z

    def forward(self, x):
        return self.solver(torch.zeros_like(x), dict(self.cell.named_parameters()), x)

    def unrolled(self, x):
        return self.iterate(torch.zeros_like(x), dict(self.cell.named_parameters()), x)


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), grad(loss, model.parameters()), strict=True))


# --- autocast -------------------------------------------------------------------------------------


def seen_dtypes(model):
    """Note what the cell's product comes out as, wherever it runs."""
    seen = []
    model.cell.w.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    return seen


def relative_error(got, expected):
    norm = torch.linalg.vector_norm
    return max(norm(got[k].double() - expected[k]) / norm(expected[k]) for k in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["after", "inside"])
def test_the_optimality_runs_under_the_autocast_of_the_forward_pass(dtype, backward_inside):
    model, x = Equilibrium(solve_inv(ns=True, maxiter=40)), torch.randn(16, 8)
    exact = Equilibrium(None, dtype=DOUBLE)
    exact.load_state_dict(model.state_dict())
    expected = gradients(exact, exact.unrolled(x.double()).square().mean())
    seen = seen_dtypes(model)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(x).float().square().mean()
        if backward_inside:
            got = gradients(model, loss)
    if not backward_inside:
        got = gradients(model, loss)
    assert set(seen) == {dtype} and len(seen) == model.steps + 1
    # What autocast itself costs: the error of the unrolled iteration under it, in float64's eyes.
    with torch.autocast("cpu", dtype=dtype):
        unrolled = gradients(model, model.unrolled(x).float().square().mean())
    assert relative_error(got, expected) < 2 * relative_error(unrolled, expected)
    assert all(g.dtype == torch.float32 for g in got.values())


def test_a_tolerance_that_low_precision_cannot_meet_is_said_so():
    model = Equilibrium(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(16, 8)).float().square().mean()
    with pytest.warns(ti.ConvergenceWarning, match="limit of the working precision"):
        loss.backward()


def test_without_autocast_in_the_forward_pass_there_is_none_in_the_backward_pass():
    model = Equilibrium(solve_inv(ns=True, rtol=1e-5, maxiter=100))
    loss = model(torch.randn(16, 8)).square().mean()
    expected = grad(loss, model.parameters(), retain_graph=True)
    seen = seen_dtypes(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = grad(loss, model.parameters())
    assert seen == [torch.float32]
    close(got, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which jacfwd calls
@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_autocast_under_transforms(jacobian):
    """The solver's loop, and all that its derivatives do, run without autocast of their own."""
    weight = 0.1 * torch.randn(8, 8)
    solver = custom_root(
        lambda z, x: z - torch.tanh(weight @ z) - x,
        argnums=1,
        solve=solve_inv(ns=True, maxiter=40),
    )(lambda z, x: iterate(weight, z, x))
    start, xs = torch.zeros(8), torch.randn(5, 8)
    exact = torch.vmap(jacobian(lambda x: iterate(weight, start, x)))(xs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.vmap(jacobian(lambda x: solver(start, x)))(xs)
    norm = torch.linalg.vector_norm
    error, eps = norm(got - exact) / norm(exact), torch.finfo(torch.bfloat16).eps
    assert error < 2 * eps, error


def iterate(weight, z, x):
    for _ in range(40):
        z = torch.tanh(weight @ z) + x
    return z


@pytest.mark.parametrize("solve", [Dense(), None, solve_inv(ns=True)], ids=["dense", "ncg", "ns"])
def test_a_gradient_that_overflows_reaches_the_scaler(solve):
    """The scaler skips the step and halves its scale, which neither zeros nor errors would do."""
    weight = nn.Parameter(torch.ones(4))
    solver = custom_root(lambda x, w: x - w / 2, argnums=1, solve=solve)(lambda _, w: w / 2)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=10**6)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = (solver(None, weight).half() * 100).sum()  # 100 * 2^40 is too much for float16
    with pytest.warns(ti.ConvergenceWarning, match="NaN or infinity"):
        scaler.scale(loss).backward()
    assert not weight.grad.isfinite().any()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.detach(), torch.ones(4)) and scaler.get_scale() == 2.0**39
    optimizer.zero_grad()
    scaler.update(2.0**4)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = (solver(None, weight).half() * 100).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    close(weight.detach(), torch.full((4,), 1 - 0.1 * 50))


# --- checkpoints, accumulation, optimisers --------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_a_model(use_reentrant):
    model, x = Equilibrium(Dense(), dtype=DOUBLE), torch.randn(4, 8, dtype=DOUBLE)
    x.requires_grad_()
    expected = gradients(model, model(x).square().sum())
    for got in (model, model.unrolled):
        checkpoint(got, x, use_reentrant=use_reentrant).square().sum().backward()
        for name, p in model.named_parameters():
            close(p.grad, expected[name])
        model.zero_grad()


def test_a_checkpoint_inside_the_optimality():
    model, x = Equilibrium(Dense(), dtype=DOUBLE), torch.randn(4, 8, dtype=DOUBLE)
    expected = gradients(model, model(x).square().sum())
    plain = model.cell.forward
    model.cell.forward = lambda z, x: checkpoint(plain, z, x, use_reentrant=False)
    close(gradients(model, model(x).square().sum()), expected)


def test_accumulated_gradients_are_those_of_one_batch():
    model, x = Equilibrium(Dense(), dtype=DOUBLE), torch.randn(12, 8, dtype=DOUBLE)
    expected = gradients(model, model(x).square().sum())
    for part in x.split(4):
        model(part).square().sum().backward()
    close({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, ti.SGD])
def test_an_optimiser_step_between_forward_and_backward_is_noticed(make):
    model, x = Equilibrium(Dense()), torch.randn(4, 8)
    optimizer = make(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    loss = model(x).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_learns():
    """Twenty steps of Adam: implicit and unrolled gradients lead to the same losses."""
    x, y = torch.randn(16, 8, dtype=DOUBLE), torch.rand(16, 8, dtype=DOUBLE) - 0.5

    def losses(implicit):
        torch.manual_seed(1)
        model = Equilibrium(Dense(), dtype=DOUBLE)
        optimizer, values = torch.optim.Adam(model.parameters(), lr=1e-2), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = ((model(x) if implicit else model.unrolled(x)) - y).square().mean()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    implicit, unrolled = losses(True), losses(False)
    assert implicit[-1] < implicit[0] / 2
    close(implicit, unrolled, rtol=1e-6, atol=0)


# --- no gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_solver_without_gradients(mode):
    model, x = Equilibrium(Dense()), torch.randn(4, 8)
    expected = model.unrolled(x).detach()
    with mode():
        solution = model(x)
    assert not solution.requires_grad and solution.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(solution, expected)
    model(x).sum().backward()  # and nothing of it stays


class Ridge(ImplicitMetaGradientModule, linear_solve=solve_inv()):
    def __init__(self, reg, data):
        super().__init__()
        self.reg = reg
        self.register_buffer("data", data)
        self.scale = nn.Parameter(torch.ones((), dtype=DOUBLE), requires_grad=False)
        self.w = nn.Parameter(torch.zeros(3, dtype=DOUBLE))

    def objective(self, y):
        residual = self.scale * self.data @ self.w - y
        return 0.5 * residual.square().sum() + 0.5 * self.reg * self.w.square().sum()

    def closed_form(self, y):
        a = self.scale * self.data
        return torch.linalg.solve(a.T @ a + self.reg * torch.eye(3, dtype=DOUBLE), a.T @ y)

    def solve(self, y):
        self.w.copy_(self.closed_form(y))
        return self


@pytest.fixture
def ridge():
    reg = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    return Ridge(reg, torch.randn(6, 3, dtype=DOUBLE)), torch.randn(6, dtype=DOUBLE)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solved", [False, True])
def test_a_module_solved_without_gradients(ridge, mode, solved):
    module, y = ridge
    leaf = module.w
    if solved:
        module.solve(-y)
    with mode():
        module.solve(y)
    assert module.w is leaf and leaf.is_leaf and leaf.requires_grad and not leaf.is_inference()
    close(module.w.detach(), module.closed_form(y).detach())
    got, expected = (grad(w.sum(), module.reg) for w in (module.solve(y).w, module.closed_form(y)))
    close(got, expected)


# --- what a module shares with the graph of its solution ------------------------------------------


def test_frozen_parameters_changed_before_the_backward_pass_are_noticed(ridge):
    module, y = ridge
    loss = module.solve(y).w.sum()
    with torch.no_grad():
        module.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(loss, module.reg)


def test_buffers_are_those_of_the_solve(ridge):
    module, y = ridge
    (expected,) = grad(module.closed_form(y).sum(), module.reg)
    loss = module.solve(y).w.sum()
    module.data.zero_()
    close(grad(loss, module.reg)[0], expected)


def test_the_backward_pass_leaves_buffers_alone():
    class Normed(Ridge):
        def __init__(self, reg, data):
            super().__init__(reg, data)
            self.register_buffer("calls", torch.zeros(()))

        def optimality(self, y):
            self.calls += 1
            residual = self.scale * self.data @ self.w - y
            return (self.data.T @ (self.scale * residual) + self.reg * self.w,)

    reg = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    module, y = Normed(reg, torch.randn(6, 3, dtype=DOUBLE)), torch.randn(6, dtype=DOUBLE)
    losses = [module.solve(k * y).w.sum() for k in range(3)]
    sum(losses).backward()
    assert module.calls == 0
    close(reg.grad, grad(module.closed_form(3 * y).sum(), reg)[0])


# --- memory ---------------------------------------------------------------------------------------


def live_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def live():
    """How many tensors there are, and how many objects in all."""
    return live_tensors(), len(gc.get_objects())


def test_a_solve_frees_its_memory_at_once():
    """Without the garbage collector: it does not see how much a tensor holds."""
    model, x = Equilibrium(Dense()), torch.randn(4, 8)

    def step():
        model(x).square().sum().backward()
        model.zero_grad()

    step()
    gc.collect()
    gc.disable()
    try:
        tensors, objects = live()
        for _ in range(20):
            step()
        tensors_after, objects_after = live()
    finally:
        gc.enable()
    assert tensors_after == tensors
    assert objects_after - objects < 20  # not one for each solve


@pytest.mark.parametrize("kind", ["function", "module"])
def test_two_hundred_solves_leave_memory_flat(kind, ridge):
    model, x = Equilibrium(Dense(), n=2, steps=3), torch.randn(2, 2)
    module, y = ridge

    def step(i):
        if kind == "function":
            model(x).square().sum().backward() if i % 2 else model(x)
        else:
            loss = module.solve(y).w.square().sum()
            grad(loss, module.reg, create_graph=True) if i % 2 else None

    for i in range(20):
        step(i)
    gc.collect()
    tensors, objects = live()
    for i in range(200):
        step(i)
    gc.collect()
    tensors_after, objects_after = live()
    assert tensors_after == tensors
    assert objects_after - objects < 100  # not one for every other solve


def test_two_hundred_solves_of_a_large_problem():
    """What autograd holds is not seen by Python: 4 MB kept in each solve would be 800."""
    weight = torch.ones(10**6, requires_grad=True)
    solver = custom_root(lambda x, w: x - w, argnums=1, solve=lambda matvec, b: b)(
        lambda _, w: w + 0
    )

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

    for i in range(220):
        if i == 20:
            before = peak()
        (got,) = grad(solver(None, weight).sum(), weight, create_graph=i % 2 == 0)
    assert got[0] == 1 and peak() - before < 100
