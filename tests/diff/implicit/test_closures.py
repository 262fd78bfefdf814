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
    with pytest.raises(RuntimeError, match="closes over a tensor, or over an object"):
        transform(lambda x: solved_by(hold, x, W))(x)


@each_holder
def test_forward_ad_in_a_tensor_that_the_optimality_holds_is_an_error(hold):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X0, torch.ones_like(X0))
        with pytest.raises(RuntimeError, match="closes over a tensor, or over an object"):
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
