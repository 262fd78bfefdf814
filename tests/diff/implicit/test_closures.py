"""Tensors that an optimality holds, in whatever way, without being given them."""

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import vmap

import tritonimplicit as ti
from tritonimplicit.linear_solve import Dense

DOUBLE = torch.float64
START, W = torch.zeros(3, dtype=DOUBLE), torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
X0 = torch.tensor([0.5, -0.3, 0.7], dtype=DOUBLE)

# torch.func.jvp itself calls torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def residual(z, w, x):
    return z - torch.tanh(w * z + x)


def iterate(z, w, x):
    for _ in range(60):
        z = torch.tanh(w * z + x)
    return z


class Problem:
    """A residual that reaches x through the object's attributes."""

    def __init__(self, x):
        self.held = [x]

    def residual(self, z, w):
        return residual(z, w, self.held[0])

    __call__ = residual

    def objective(self, z, w):
        return (self.residual(z, w) * z).sum()


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x

    def __call__(self, z, w):
        return residual(z, w, self.x)


class Composed:
    def __init__(self, inner):
        self.inner = inner

    def residual(self, z, w):
        return self.inner(z, w)


def calls_an_object(x):
    problem = Problem(x)
    return lambda z, w: problem.residual(z, w)


def adds(add):
    return lambda z, w: z - w * z - add(z) * 0.1


def local_class(x):
    class Local:
        def __call__(self, z, w):
            return residual(z, w, x)

    return Local()


HOLDERS = {
    "closure": lambda x: lambda z, w: residual(z, w, x),
    "method": lambda x: Problem(x).residual,
    "callable object": Problem,
    "slots": Slotted,
    "callable in an object": lambda x: Composed(Problem(x)).residual,
    "object in a closure": calls_an_object,
    "callable in a partial": lambda x: functools.partial(Problem(x)),
    "closure of a class": local_class,
    "gradient of a method": lambda x: torch.func.grad(Problem(x).objective),
    "default": lambda x: lambda z, w, x=x: residual(z, w, x),
    "keyword default": lambda x: lambda z, w, *, x=x: residual(z, w, x),
    "method of the tensor": lambda x: adds(x.add),
}


def solved_by(hold, x, w):
    """The sum of a root whose solver does not use x, and so cannot be what notices."""
    return ti.custom_root(hold(x), argnums=1, solve=Dense())(lambda z, w: z + 0)(START, w).sum()


each_holder = pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())


@each_holder
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, vmap])
def test_a_transformed_tensor_that_the_optimality_holds_is_an_error(hold, transform):
    x = X0.expand(2, 3) if transform is vmap else X0
    with pytest.raises(RuntimeError, match="closes over tensors, or over objects"):
        transform(lambda x: solved_by(hold, x, W))(x)


@each_holder
def test_forward_ad_in_a_tensor_that_the_optimality_holds_is_an_error(hold):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X0, torch.ones_like(X0))
        with pytest.raises(RuntimeError, match="closes over tensors, or over objects"):
            solved_by(hold, x, W)


@each_holder
def test_a_tensor_that_is_held_may_be_a_constant(hold):
    gradient = torch.func.grad(lambda w: solved_by(hold, X0, w))(W)
    assert gradient.shape == W.shape


@each_holder
def test_a_held_tensor_is_warned_of_where_no_argument_requires_grad(hold):
    with pytest.warns(UserWarning, match="optimality_fn uses 1 tensors that require grad"):
        solved_by(hold, X0.clone().requires_grad_(), W)


def test_a_tensor_kept_from_a_transform_that_is_over_is_a_constant():
    """Such as the solution of the call before, for a warm start."""

    class Warm(Problem):
        def residual(self, z, w):
            return residual(z, w, X0)

        def solution(self, w):
            root = ti.custom_root(self.residual, argnums=1, solve=Dense())
            self.held[0] = root(lambda z, w: iterate(self.held[0], w, X0))(START, w)
            return self.held[0]

    warm = Warm(START)
    for w in (W, 2 * W):
        got = torch.func.grad(lambda w: warm.solution(w).sum())(w)
        expected = torch.func.grad(lambda w: iterate(START, w, X0).sum())(w)
        torch.testing.assert_close(got, expected)


class Record:
    def __init__(self, x):
        self.losses = [x]


class Trainer:
    def __init__(self, x):
        self.record = Record(x)

    def residual(self, z, w):
        return residual(z, w, X0)


def test_objects_among_the_attributes_of_an_object_are_not_searched():
    gradient = torch.func.grad(lambda w: solved_by(lambda _: Trainer(w).residual, X0, w))(W)
    assert gradient.shape == W.shape


@pytest.mark.parametrize("grad_by_argument", [True, False])
def test_a_fixed_points_function_is_called_by_its_name(grad_by_argument):
    w, x = W.clone().requires_grad_(), X0.clone().requires_grad_(grad_by_argument)
    solver = ti.custom_fixed_point(lambda z, x: torch.tanh(w * z + x), argnums=1, solve=Dense())
    with pytest.warns(UserWarning, match="^fixed_point_fn uses 1 tensors that require grad"):
        z = solver(lambda z, x: iterate(z, w, x))(START, x)
        if grad_by_argument:
            z.sum().backward()


def test_a_modules_optimality_is_called_by_its_name():
    held = {"w": W.clone().requires_grad_()}

    class Module(ti.nn.ImplicitMetaGradientModule, linear_solve=Dense()):
        def __init__(self, x):
            super().__init__()
            self.x, self.z = x, torch.nn.Parameter(torch.zeros(3, dtype=DOUBLE))

        def optimality(self):
            return (residual(self.z, held["w"], self.x),)

        def solve(self):
            self.z.copy_(iterate(START, held["w"], self.x))
            return self

    z = Module(X0.clone().requires_grad_()).solve().z
    with pytest.warns(UserWarning, match=r"^the module's optimality.* register_meta_parameter"):
        z.sum().backward()


def test_a_layer_under_a_transform_is_called_by_its_name():
    deq = ti.nn.DEQ(lambda z, x: torch.tanh(held[0] * z) + x)
    held = []

    def loss(w):
        held[:] = [w]
        return deq(X0[None]).sum()

    with pytest.raises(RuntimeError, match=r"^the layer of a DEQ closes over .* deq\(x, w\)"):
        torch.func.grad(loss)(W)


# --- Random numbers -------------------------------------------------------------------------------


def dropped(z, x):
    return 0.25 * torch.nn.functional.dropout(z, 0.5) + x


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: torch.autograd.grad(f(x).sum(), x),
        lambda f, x: torch.autograd.grad(f(x).sum(), x, create_graph=True),
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x.detach()),
        lambda f, x: torch.func.jvp(f, (x.detach(),), (torch.ones_like(x),)),
    ],
    ids=["backward", "create_graph", "func.grad", "jvp"],
)
def test_random_numbers_in_an_optimality_are_warned_of(derivative):
    torch.manual_seed(0)
    x = X0.clone().requires_grad_()
    solver = ti.custom_fixed_point(dropped, argnums=1, solve=Dense())(lambda z, x: dropped(z, x))
    with pytest.warns(UserWarning, match="^fixed_point_fn draws random numbers") as told:
        derivative(lambda x: solver(START, x), x)
    assert told[0].filename == __file__


def test_a_mask_that_is_an_argument_is_right_and_not_warned_of():
    mask = torch.tensor([0.0, 2.0, 2.0], dtype=DOUBLE)
    x = X0.clone().requires_grad_()
    solver = ti.custom_fixed_point(lambda z, x, mask: 0.25 * mask * z + x, argnums=1, solve=Dense())
    z = solver(lambda z, x, mask: x / (1 - 0.25 * mask))(START, x, mask)
    (got,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(got, 1 / (1 - 0.25 * mask))


@pytest.mark.gpu
def test_random_numbers_of_a_gpu_are_warned_of():
    start, x = START.cuda(), X0.cuda().requires_grad_()
    solver = ti.custom_fixed_point(dropped, argnums=1, solve=Dense())(dropped)
    with pytest.warns(UserWarning, match="^fixed_point_fn draws random numbers"):
        solver(start, x).sum().backward()


def test_a_wording_of_somebody_elses_is_none_of_ours():
    problem = Problem(X0.clone().requires_grad_())
    problem.wording = "theirs"
    with pytest.warns(UserWarning, match="^optimality_fn uses 1 tensors that require grad"):
        solved_by(lambda _: problem, X0, W)
