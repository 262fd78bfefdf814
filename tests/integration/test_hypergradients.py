"""Equal hypergradients, and solvers of either library within the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.integration.problems import (
    LIBRARIES,
    TORCH_WARNINGS,
    equilibrium,
    imaml_function,
    imaml_module,
    make_solver,
    ridge_closed_form,
    ridge_function,
    ridge_module,
)

pytestmark = TORCH_WARNINGS
THEIRS, OURS = LIBRARIES["TorchOpt"], LIBRARIES["tritonimplicit"]
PROBLEMS = {
    "ridge function": ridge_function,
    "ridge module": ridge_module,
    "iMAML function": imaml_function,
    "iMAML module": imaml_module,
    "equilibrium": equilibrium,
}
CASES = [
    (problem, solver)
    for problem in PROBLEMS
    for solver in ("cg", "normal_cg", "neumann", "dense")
    if (problem, solver) != ("equilibrium", "cg")  # CG is for symmetric matrices
]


def hypergradient(problem: str, root: str, solver_of: str, solver: str) -> Tensor:
    """Of one library's root, with the other's solver perhaps."""
    solve = make_solver(LIBRARIES[solver_of], solver)
    if solver == "dense" and problem.startswith("iMAML"):
        # One leaf: of several, TorchOpt's dense solve takes the diagonal blocks alone.
        return PROBLEMS[problem](LIBRARIES[root], solve, bias=False)
    return PROBLEMS[problem](LIBRARIES[root], solve)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    # Solves to 1e-12 relative, of matrices whose condition number is below 10.
    assert expected.norm() > 1e-3
    assert (actual - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize(("problem", "solver"), CASES)
def test_hypergradients_are_equal(problem, solver):
    theirs = hypergradient(problem, "TorchOpt", "TorchOpt", solver)
    assert_equal(hypergradient(problem, "tritonimplicit", "tritonimplicit", solver), theirs)


@pytest.mark.parametrize(("problem", "solver"), CASES)
def test_our_solvers_in_torchopt(problem, solver):
    theirs = hypergradient(problem, "TorchOpt", "TorchOpt", solver)
    assert_equal(hypergradient(problem, "TorchOpt", "tritonimplicit", solver), theirs)


@pytest.mark.parametrize(("problem", "solver"), CASES)
def test_torchopts_solvers_in_ours(problem, solver):
    theirs = hypergradient(problem, "TorchOpt", "TorchOpt", solver)
    assert_equal(hypergradient(problem, "tritonimplicit", "TorchOpt", solver), theirs)


@pytest.mark.parametrize("root", LIBRARIES)
@pytest.mark.parametrize("problem", ["iMAML function", "iMAML module"])
def test_our_dense_solver_takes_several_leaves(problem, root):
    ours = PROBLEMS[problem](LIBRARIES[root], make_solver(OURS, "dense"))
    assert_equal(ours, PROBLEMS[problem](THEIRS, make_solver(THEIRS, "cg")))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("problem", ["ridge function", "ridge module"])
def test_ridge_is_the_closed_form(problem, library):
    assert_equal(hypergradient(problem, library, library, "dense"), ridge_closed_form())


@pytest.mark.parametrize("root", LIBRARIES)
def test_the_default_solver_is_the_same(root):
    """Normal CG to 1e-5, of the normal equations."""
    default = equilibrium(LIBRARIES[root], None)
    named = equilibrium(THEIRS, THEIRS.linear_solve.solve_normal_cg())
    torch.testing.assert_close(default, named, rtol=0, atol=float(1e-10 * named.norm()))
