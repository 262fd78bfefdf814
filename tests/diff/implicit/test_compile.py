"""Roots inside torch.compile(fullgraph=True), on the CPU."""

import pytest
import torch
from torch.autograd import grad
from torch.func import vmap

import tritonimplicit as ti
from tritonimplicit.linear_solve import Dense, NormalCG

DOUBLE = torch.float64
close = torch.testing.assert_close
OLD = torch.torch_version.TorchVersion(torch.__version__) < "2.13"
pytestmark = [
    pytest.mark.skipif(OLD, reason="the compiler of torch before 2.13 cannot take solvers in"),
    # What the compiler itself calls.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

torch.manual_seed(0)
W = 0.4 * torch.randn(6, 6, dtype=DOUBLE) / 6**0.5
U, X0 = torch.randn(6, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
START = torch.zeros(6, dtype=DOUBLE)


def residual(z, w, u, x):
    return z - torch.tanh(w @ z + u @ x)


def unrolled(z, w, u, x):
    for _ in range(80):
        z = torch.tanh(w @ z + u @ x)
    return z


def iterate(z, w, u, x):
    """Stops on a value, which no graph can."""
    for _ in range(300):
        z, before = torch.tanh(w @ z + u @ x), z
        if (z - before).norm().item() < 1e-15:
            break
    return z


def solver(solve, iteration=iterate):
    return ti.compilable(ti.custom_root(residual, argnums=(1, 2, 3), solve=solve)(iteration))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("solve", [Dense(), NormalCG(rtol=1e-14)], ids=["dense", "normal_cg"])
def test_a_loss_through_a_root_and_its_gradient(backend, solve):
    root = solver(solve)
    loss = torch.compile(
        lambda w, x: root(START, w, U, x).pow(2).sum(), backend=backend, fullgraph=True
    )
    for scale in (1.0, 0.5):  # nothing of the first call is baked in
        w, x = (W * scale).requires_grad_(), (X0 + scale).requires_grad_()
        got = grad(loss(w, x), (w, x))
        close(got, grad(unrolled(START, w, U, x).pow(2).sum(), (w, x)))


def test_a_training_step_with_its_backward_pass_inside():
    root = solver(Dense())

    def step(w, x):
        loss = root(START, w, U, x).pow(2).sum()
        (gradient,) = grad(loss, w)
        return w.detach() - 0.1 * gradient

    w = W.clone().requires_grad_()
    expected = step_of(unrolled, w)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = torch.compile(step, backend="inductor", fullgraph=True)(w, X0)
    close(got, expected)


def step_of(root, w):
    (gradient,) = grad(root(START, w, U, X0).pow(2).sum(), w)
    return w.detach() - 0.1 * gradient


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.hessian,
        lambda f: lambda x: vmap(torch.func.grad(f))(x * torch.ones(4, 1, dtype=DOUBLE)),
    ],
    ids=["grad", "hessian", "vmap of grad"],
)
def test_transforms_inside_the_graph(transform):
    root = solver(Dense(), unrolled)  # as for any vmap, a solver that does not look at values
    compiled = torch.compile(
        lambda x: transform(lambda x: root(START, W, U, x).pow(2).sum())(x),
        backend="aot_eager",
        fullgraph=True,
    )
    close(compiled(X0), transform(lambda x: unrolled(START, W, U, x).pow(2).sum())(X0))


def test_an_initial_guess_that_does_not_look_like_the_solution_is_noticed():
    other = ti.compilable(ti.custom_root(lambda z, x: z - x, argnums=1)(lambda _, x: x + 0))
    with pytest.raises(RuntimeError, match="other shapes or dtypes than its initial guess"):
        torch.compile(lambda x: other(START, x) * 2, backend="aot_eager", fullgraph=True)(X0)


def test_without_an_initial_guess_of_tensors_there_is_an_error():
    guessless = ti.compilable(ti.custom_root(lambda z, x: z - x, argnums=1)(lambda _, x: x + 0))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(lambda x: guessless(1.0, x) * 2, backend="aot_eager", fullgraph=True)(X0)


def test_compilable_inside_the_compiled_function_is_an_error_or_a_graph_break():
    root = ti.custom_root(residual, argnums=(1, 2, 3), solve=Dense())(iterate)

    def loss(x):
        return ti.compilable(root)(START, W, U, x).pow(2).sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="call compilable before"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(X0)
    torch._dynamo.reset()
    close(torch.compile(loss, backend="aot_eager")(X0), unrolled(START, W, U, X0).pow(2).sum())
