"""Solutions and arguments of any structure, arguments by position and by name."""

import collections
import dataclasses
import functools

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, grad

from tritonimplicit import custom_fixed_point, custom_root
from tritonimplicit.linear_solve import Dense

DOUBLE = torch.float64
PREFIX = r"^custom_root\(optimality_fn\)\(solver_fn\)\(\*args\):"
NAMESPACE = "tritonimplicit"
# torch.autograd.forward_ad itself calls torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

Pair = collections.namedtuple("Pair", "left right")


@optree.dataclasses.dataclass(namespace=NAMESPACE)
class State:
    value: object
    steps: object = None


@dataclasses.dataclass
class Plain:
    value: object
    inner: object = None


class Box:
    """A registered container that is no dataclass."""

    def __init__(self, content):
        self.content = content


optree.register_pytree_node(
    Box, lambda box: ((box.content,), None), lambda _, c: Box(*c), namespace=NAMESPACE
)


def leaf(*shape):
    return torch.randn(shape, dtype=DOUBLE, requires_grad=True)


def tensors_of(tree):
    return [t for t in optree.tree_leaves(tree, namespace=NAMESPACE) if isinstance(t, torch.Tensor)]


def tree_map(fn, *trees):
    return optree.tree_map(fn, *trees, namespace=NAMESPACE)


def cube_root_of(tree):
    """The root of x^3 = a, leaf by leaf: the solver and its optimality, for any pytree of tensors.

    The tensors are coupled by their sum, so that no leaf stands alone: x^3 = a + (sum of x - s),
    where s is the sum at the solution.
    """
    total = sum(t.detach().sign().mul(t.detach().abs().pow(1 / 3)).sum() for t in tensors_of(tree))

    def optimality(x, a):
        excess = sum(t.sum() for t in tensors_of(x)) - total
        return tree_map(lambda x, a: x**3 - a + excess, x, a)

    def solver(_, a):
        return tree_map(lambda a: a.sign() * a.abs().pow(1 / 3), a)

    return custom_root(optimality, argnums=1, solve=Dense())(solver)


def closed_form_gradient(tensors):
    """Of the sum of squares of the solution: (D + 1 1^T) dx = da, with D = 3 x^2."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    x = flat.sign() * flat.abs().pow(1 / 3)
    u = torch.linalg.solve(torch.diag(3 * x**2) + torch.ones(len(x), len(x), dtype=DOUBLE), 2 * x)
    parts = u.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def check(tree):
    solution = cube_root_of(tree)(None, tree)
    structure = functools.partial(optree.tree_structure, namespace=NAMESPACE)
    assert structure(solution) == structure(tree)
    got = grad(sum(t.square().sum() for t in tensors_of(solution)), tensors_of(tree))
    torch.testing.assert_close(list(got), closed_form_gradient(tensors_of(tree)))
    return solution


TREES = {
    "0-dim": lambda: leaf(),
    "list": lambda: [leaf(2), (leaf(), leaf(1, 2))],
    "dict, not in the order of its keys": lambda: {"b": leaf(2), "a": {"y": leaf(), "x": leaf(1)}},
    "ordered dict": lambda: collections.OrderedDict(b=leaf(2), a=leaf()),
    "default dict": lambda: collections.defaultdict(list, b=leaf(2), a=leaf()),
    "deque": lambda: collections.deque([leaf(2), leaf()], maxlen=3),
    "namedtuple with None": lambda: Pair(leaf(2), Pair(None, leaf())),
    "dataclass": lambda: State(leaf(2), {"a": leaf()}),
    "registered class": lambda: Box([leaf(2), State(leaf(), None)]),
}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_containers_come_back_as_they_went_in(make):
    torch.manual_seed(0)
    tree = make()
    solution = check(tree)
    assert type(solution) is type(tree)
    if isinstance(tree, dict):
        assert list(solution) == list(tree)


nested = st.recursive(
    st.sampled_from([(), (1,), (2,), (1, 2), (0, 3), None]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        st.tuples(inner, inner).map(lambda pair: State(*pair)),
    ),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(shapes=nested.filter(lambda t: any(0 not in s for s in flat_shapes(t))))
def test_random_structures(shapes):
    torch.manual_seed(0)
    tree = optree.tree_map(lambda s: leaf(*s), shapes, is_leaf=is_shape, namespace=NAMESPACE)
    check(tree)


def is_shape(tree):
    return type(tree) is tuple and all(isinstance(n, int) for n in tree)


def flat_shapes(tree):
    return optree.tree_leaves(tree, is_leaf=is_shape, namespace=NAMESPACE)


def test_arguments_that_hold_more_than_tensors():
    """The optimality sees them as the caller gave them; integers and None are no obstacle."""
    given_to_optimality = []
    options = {"power": 3, "name": "p", "none": None, "index": torch.tensor([1, 0])}

    @custom_root(
        lambda x, p: given_to_optimality.append(p) or x ** p["power"] - p["a"][p["index"]],
        argnums=1,
        solve=Dense(),
    )
    def solver(init, p):
        assert {**p, "a": None, "index": None} == {**options, "a": None, "index": None}
        return p["a"][p["index"]].pow(1 / p["power"])

    a = torch.tensor([8.0, 27.0], dtype=DOUBLE, requires_grad=True)
    (got,) = grad(solver(None, {**options, "a": a}).sum(), a)
    torch.testing.assert_close(got, torch.tensor([1 / 12, 1 / 27], dtype=DOUBLE))
    (seen,) = given_to_optimality
    assert list(seen) == [*options, "a"] and seen["name"] == "p" and seen["none"] is None


# --- names ----------------------------------------------------------------------------------------


def affine(init, a, b, *rest, c, d=None, **more):
    return a + 2 * b + 3 * c + sum(rest) + sum(more.values())


def affine_optimality(x, a, b, *rest, c, d=None, **more):
    return x - affine(None, a, b, *rest, c=c, **more)


NAMED = [
    ({"argnames": "a"}, "a"),
    ({"argnames": "c"}, "c"),
    ({"argnames": ("b", "c")}, "bc"),
    ({"argnames": ["e", "a"]}, "ea"),
    ({"argnums": 2, "argnames": "c"}, "bc"),
    ({"argnums": (1, 3), "argnames": "a"}, "ar"),
]


@pytest.mark.parametrize(("which", "named"), NAMED)
@pytest.mark.parametrize("by_keyword", [False, True])
def test_arguments_by_name(which, named, by_keyword):
    t = {name: torch.ones(2, requires_grad=True) for name in "abcer"}
    slopes = {"a": 1.0, "b": 2.0, "c": 3.0, "e": 1.0, "r": 1.0}
    solver = custom_root(affine_optimality, **which)(affine)
    if by_keyword and "r" not in named:
        x = solver(c=t["c"], b=t["b"], a=t["a"], init=None, e=t["e"])
    else:
        x = solver(None, t["a"], t["b"], t["r"], c=t["c"], e=t["e"])
    x.sum().backward()
    for name, tensor in t.items():
        if name in named:
            torch.testing.assert_close(tensor.grad, torch.full((2,), slopes[name]))
        else:
            assert tensor.grad is None


def test_names_of_a_fixed_point_under_transforms():
    solver = custom_fixed_point(lambda z, *, x: z / 2 + x["x"], argnames="x", solve=Dense())(
        lambda z, *, x: 2 * x["x"]
    )
    xs = torch.randn(3, 2, dtype=DOUBLE)
    z0 = torch.zeros(2, dtype=DOUBLE)
    got = torch.vmap(torch.func.jacrev(lambda x: solver(z0, x={"x": x})))(xs)
    torch.testing.assert_close(got, 2 * torch.eye(2, dtype=DOUBLE).expand(3, 2, 2))


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ({}, ValueError, "name an argument"),
        ({"argnames": ()}, ValueError, "name an argument"),
        ({"argnames": 1}, TypeError, "argnames must be"),
        ({"argnames": ("a", 1)}, TypeError, "argnames must be"),
        ({"argnames": "init"}, ValueError, "initial guess 'init'"),
    ],
)
def test_names_of_nothing(which, error, message):
    with pytest.raises(error, match=message):
        custom_root(affine_optimality, **which)(affine)


def test_a_named_argument_that_the_call_lacks():
    solver = custom_root(affine_optimality, argnames=("a", "f"))(affine)
    one = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=PREFIX + r" argnames='f', .* keywords \['c', 'd'\]"):
        solver(None, one, one, c=one)


# --- what optree does not look into ---------------------------------------------------------------


OPAQUE = {
    "dataclass": lambda t: Plain(t),
    "nested dataclass": lambda t: Plain(1, [Plain({"t": t})]),
    "object": lambda t: type("Object", (), {"__init__": lambda s: vars(s).update(t=[t])})(),
    "dataclass with slots": lambda t: dataclasses.make_dataclass("S", ["t"], slots=True)(t),
    "module": lambda t: torch.nn.Linear(2, 2),
    "partial": lambda t: functools.partial(torch.add, t),
    "closure": lambda t: lambda: t,
}


@pytest.mark.parametrize("make", OPAQUE.values(), ids=OPAQUE.keys())
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a tensor"])
def test_an_opaque_argument_would_lose_its_gradient(make, beside):
    opaque = make(torch.ones(2, requires_grad=True))
    argument = {"a": opaque, "b": torch.ones(2, requires_grad=True)} if beside else opaque
    solver = custom_root(lambda x, p: x, argnums=1)(lambda _, p: torch.zeros(2))
    with pytest.raises(RuntimeError, match=PREFIX + ".*Register its class by optree.dataclasses"):
        solver(None, argument)


def test_an_opaque_argument_under_transforms():
    solver = custom_root(lambda x, p: x - p["a"].value, argnums=1)(lambda _, p: p["a"].value + 0)
    one = torch.ones(2)

    def f(t):
        return solver(None, {"a": Plain(t), "b": one}).sum()

    for transform in (torch.func.grad(f), lambda t: torch.func.vjp(f, t), torch.vmap(f)):
        with pytest.raises(RuntimeError, match="Register its class"):
            transform(torch.ones(2, 2))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Register its class"):
        f(forward_ad.make_dual(one, one))


def test_an_opaque_argument_without_gradients_is_an_argument():
    b = torch.ones(2, requires_grad=True)
    solver = custom_root(lambda x, p: x - p["a"].value * p["b"], argnums=1)(
        lambda _, p: p["a"].value * p["b"]
    )
    (got,) = grad(solver(None, {"a": Plain(torch.full((2,), 3.0)), "b": b}).sum(), b)
    assert got.tolist() == [3, 3]
    with torch.no_grad():
        solver(None, {"a": Plain(torch.ones(2, requires_grad=True)), "b": b})


def test_an_opaque_argument_that_no_gradient_is_asked_for():
    """The optimality uses it nevertheless, which the backward pass notices."""
    b, hidden = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    solver = custom_root(lambda x, b, p: x - p.value * b, argnums=1)(lambda _, b, p: p.value * b)
    with pytest.warns(UserWarning, match="are in no argument named"):
        solver(None, b, Plain(hidden)).sum().backward()


def test_an_opaque_solution():
    solver = custom_root(lambda x, p: x, argnums=1)(lambda _, p: Plain(p + 0))
    with pytest.raises(RuntimeError, match=PREFIX + ".*becomes one by optree.dataclasses"):
        solver(None, torch.ones(2, requires_grad=True))


def test_forward_ad_through_a_closure_is_an_error():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        solver = custom_root(lambda z, w: z - w * x, argnums=1)(lambda _, w: w * x)
        with pytest.raises(RuntimeError, match="closes over"):
            solver(None, torch.ones(2))


class Layer(torch.nn.Module):
    """x = w z + x, with its weight out of the arguments' sight, or as an argument."""

    def __init__(self, as_argument):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((2,), 0.5, dtype=DOUBLE))
        self.as_argument = as_argument

    def forward(self, x):
        if self.as_argument:
            return custom_root(self.residual_for, argnums=(1, 2), solve=Dense())(
                lambda _, p, x: x / (1 - p["w"])
            )(None, dict(self.named_parameters()), x)
        return custom_root(self.residual, argnums=1, solve=Dense())(lambda _, x: x / (1 - self.w))(
            None, x
        )

    def residual(self, z, x):
        return z - self.w * z - x

    def residual_for(self, z, weights, x):
        return z - weights["w"] * z - x


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
def test_a_modules_parameters_under_transforms(transform):
    """Out of sight, they would silently get a gradient of zero."""
    x, weights = torch.ones(2, dtype=DOUBLE), {"w": torch.full((2,), 0.2, dtype=DOUBLE)}

    def of(layer):
        return transform(lambda w: torch.func.functional_call(layer, w, (x,)).sum())(weights)["w"]

    torch.testing.assert_close(of(Layer(True)), torch.full((2,), 1 / 0.8**2, dtype=DOUBLE))
    with pytest.raises(RuntimeError, match="solver_fn uses a tensor that is none of its arguments"):
        of(Layer(False))


def test_a_solver_may_transform_tensors_of_its_own():
    def objective(x, a):
        return (x - a).square().sum()

    def solver(x, a):
        return x - torch.func.grad(objective)(x, a) / 2

    f = custom_root(torch.func.grad(objective), argnums=1, solve=Dense())(solver)
    zero = torch.zeros(2, dtype=DOUBLE)
    got = torch.func.jacrev(lambda a: f(zero, a))(zero + 1)
    torch.testing.assert_close(got, torch.eye(2, dtype=DOUBLE))


@pytest.mark.parametrize("kind", ["closure", "method", "module", "partial"])
def test_parameters_out_of_sight_while_no_argument_requires_grad(kind):
    """There is no backward pass to warn of them."""
    layer = Layer(False)
    optimality = {
        "closure": lambda z, x: layer.residual(z, x),
        "method": layer.residual,
        "module": lambda z, x: z - layer(x),
        "partial": functools.partial(lambda w, z, x: z - w * z - x, layer.w),
    }[kind]
    solver = custom_root(optimality, argnums=1)(lambda _, x: x + 0)
    x = torch.ones(2, dtype=DOUBLE)
    with pytest.warns(UserWarning, match="uses 1 tensors that require grad"):
        solver(None, x)
    with torch.no_grad():
        solver(None, x)
    layer.requires_grad_(False)
    solver(None, x)
