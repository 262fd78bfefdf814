"""The same mistakes raise the same errors in both libraries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.integration.problems import LIBRARIES, TORCH_WARNINGS

pytestmark = TORCH_WARNINGS
PREFIX = r"^custom_root\(optimality_fn\)\(solver_fn\)\(\*args\): "


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


def difference(x, a):
    return x - a


# --- custom_root ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [3.0, "three", None, (1.0, 2.0)])
def test_an_argument_that_is_no_tensor(library, value):
    solver = library.diff.implicit.custom_root(difference, argnums=1)(lambda x, a: x)
    with pytest.raises(RuntimeError, match=PREFIX + "argument of function solver_fn specified"):
        solver(torch.ones(1), value)


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_the_initial_guess_has_no_gradient(library, argnums):
    with pytest.raises((AssertionError, ValueError)):  # TorchOpt's has no message
        library.diff.implicit.custom_root(difference, argnums=argnums)


@pytest.mark.parametrize("output", [None, 1.0, (torch.ones(1), "second")])
def test_an_output_that_is_no_tensor(library, output):
    solver = library.diff.implicit.custom_root(difference, argnums=1)(lambda x, a: output)
    with pytest.raises(RuntimeError, match=PREFIX + "output of function solver_fn should be a t"):
        solver(torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("output", [torch.ones(1), (torch.ones(1),), (torch.ones(1), 1, 2)])
def test_an_output_without_its_aux(library, output):
    root = library.diff.implicit.custom_root(difference, argnums=1, has_aux=True)
    with pytest.raises(RuntimeError, match=PREFIX + r"output .* should be a tuple: \(output, aux"):
        root(lambda x, a: output)(torch.ones(1), torch.ones(1))


def test_keywords_that_the_optimality_does_not_know(library):
    solver = library.diff.implicit.custom_root(difference, argnums=1)(lambda x, a, *, k: a * k)
    with pytest.raises(TypeError):  # at the call, or at the latest in the backward pass
        solver(torch.ones(1), torch.ones(1, requires_grad=True), k=2.0).backward()


# --- Linear solvers -------------------------------------------------------------------------------


def test_an_initial_guess_of_another_shape(library):
    message = "Tensors in x0 and b must have matching shapes"
    with pytest.raises(ValueError, match=message):
        library.linalg.cg(torch.eye(2), torch.ones(2), x0=torch.ones(3))
    with pytest.raises(ValueError, match=message):
        library.linear_solve.solve_cg(init=torch.ones(3))(lambda v: v, torch.ones(2))


def test_a_matrix_that_is_not_square(library):
    with pytest.raises(TypeError, match="Linear operator must be a square matrix, but has shape"):
        library.linalg.cg(torch.ones(2, 3), torch.ones(2))


def test_factories_take_what_they_are_called_with_later(library):
    given = {"matvec": lambda v: 2 * v, "b": torch.ones(3), "ridge": 0.5}
    for factory in (library.linear_solve.solve_cg, library.linear_solve.solve_inv):
        torch.testing.assert_close(factory(**given)(**given), torch.full((3,), 0.4))


# --- ImplicitMetaGradientModule -------------------------------------------------------------------


def make_module(library):
    class Module(library.nn.ImplicitMetaGradientModule):
        def __init__(self, meta):
            super().__init__()
            self.meta = meta
            self.w = nn.Parameter(torch.zeros(1))

        def objective(self):
            return (self.w - self.meta).square().sum()

        def solve(self):
            self.w.copy_(self.meta)
            return self

    return Module(torch.ones(1, requires_grad=True))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("a.b", torch.ones(1, requires_grad=True), KeyError, "can't contain"),
        ("", torch.ones(1, requires_grad=True), KeyError, "can't be empty string"),
        ("w", torch.ones(1, requires_grad=True), KeyError, "attribute 'w' already exists"),
        (b"a", torch.ones(1, requires_grad=True), TypeError, "name should be a string"),
        ("a", 1.0, TypeError, "cannot assign 'float' object to meta-parameter 'a'"),
        ("a", torch.ones(1), ValueError, "requires.grad"),
    ],
)
def test_register_meta_parameter(library, name, value, error, message):
    with pytest.raises(error, match=message):
        make_module(library).register_meta_parameter(name, value)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("a.b", nn.Linear(1, 1), KeyError),
        ("", nn.Linear(1, 1), KeyError),
        ("w", nn.Linear(1, 1), KeyError),
        (b"a", nn.Linear(1, 1), TypeError),
        ("a", torch.ones(1), TypeError),
    ],
)
def test_register_meta_module(library, name, value, error):
    with pytest.raises(error):
        make_module(library).register_meta_module(name, value)


def test_a_module_without_parameters_or_meta_parameters(library):
    class Module(library.nn.ImplicitMetaGradientModule):
        def __init__(self, *args):
            super().__init__()

        def objective(self):
            return torch.zeros(())

        def solve(self):
            return self

    module = Module()
    for method in (module.solve, module.optimality):
        with pytest.raises(RuntimeError, match=r"^The module has no parameters\.$"):
            method()
    module.w = nn.Parameter(torch.zeros(1))
    for method in (module.solve, module.optimality):
        with pytest.raises(RuntimeError, match=r"^The module has no meta-parameters\.$"):
            method()


def test_implicit_gradients_are_enabled_once(library):
    home = library.diff.implicit.nn.module
    with pytest.raises(TypeError, match=r"^Implicit gradients are already enabled for the `solve`"):
        home.enable_implicit_gradients(type(make_module(library)))


def test_no_objective_and_no_optimality(library):
    home = library.diff.implicit.nn.module
    base = library.nn.ImplicitMetaGradientModule
    with pytest.raises(TypeError, match=r"^The objective function is not defined\.$"):
        home.make_optimality_from_objective(base)
    message = r"^ImplicitMetaGradientModule requires either an optimality\(\) method or an obj"
    with pytest.raises(TypeError, match=message):
        type("Module", (base,), {"solve": lambda self: self})


@pytest.mark.parametrize("name", ["optimality", "objective"])
@pytest.mark.parametrize(
    ("member", "message"),
    [
        (staticmethod(lambda: None), "must not be a staticmethod"),
        (classmethod(lambda cls: None), "must not be a classmethod"),
        (1.0, "must be callable"),
    ],
)
def test_optimality_and_objective_must_be_methods(library, name, member, message):
    base = library.nn.ImplicitMetaGradientModule
    with pytest.raises(TypeError, match=rf"^method {name}\(\) {message}\.$"):
        type("Module", (base,), {name: member, "solve": lambda self: self})


def test_a_module_without_solve_is_abstract(library):
    base = library.nn.ImplicitMetaGradientModule
    cls = type("Module", (base,), {"objective": lambda self: None})
    with pytest.raises(TypeError, match="abstract"):
        cls()
