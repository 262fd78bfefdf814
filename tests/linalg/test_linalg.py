"""The solvers as functions of a matrix."""

import pytest
import torch

import tritonimplicit as ti
from tritonimplicit.linalg import cg, ns, ns_inv

DOUBLE = torch.float64


@pytest.fixture
def system():
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE))[0]
    matrix = (q * torch.linspace(0.3, 1.4, 5, dtype=DOUBLE)) @ q.T
    return matrix, torch.randn(5, dtype=DOUBLE)


def test_cg_takes_a_matrix_a_matvec_and_a_pytree_of_blocks(system):
    matrix, b = system
    exact = torch.linalg.solve(matrix, b)
    for a in (matrix, lambda v: matrix @ v):
        torch.testing.assert_close(cg(a, b, rtol=1e-12), exact)
    blocks = {"u": matrix, "v": 2 * torch.eye(2, dtype=DOUBLE)}
    x = cg(blocks, {"u": b, "v": torch.ones(2, dtype=DOUBLE)}, rtol=1e-12)
    torch.testing.assert_close(x["u"], exact)
    torch.testing.assert_close(x["v"], torch.full((2,), 0.5, dtype=DOUBLE))


def test_cg_uses_its_initial_guess_and_maxiter(system):
    matrix, b = system
    guess = torch.randn(5, dtype=DOUBLE)
    assert torch.equal(cg(matrix, b, guess, maxiter=0), guess)


@pytest.mark.parametrize("alpha", [None, 0.7])
def test_ns_and_ns_inv_differ_by_a_term(system, alpha):
    matrix, b = system
    a = 1.0 if alpha is None else alpha
    step = torch.eye(5, dtype=DOUBLE) - a * matrix
    powers = [torch.linalg.matrix_power(step, k) for k in range(12)]
    torch.testing.assert_close(ns(matrix, b, 11, alpha=alpha), a * sum(powers) @ b)
    torch.testing.assert_close(ns_inv(matrix, 12, alpha=alpha), a * sum(powers))
    torch.testing.assert_close(ns(matrix, b, alpha=alpha), a * sum(powers[:11]) @ b)
    torch.testing.assert_close(ns_inv(matrix, alpha=alpha), a * sum(powers[:10]))


def test_ns_inv_of_a_nonsymmetric_matrix_is_no_transpose():
    matrix = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=DOUBLE)
    torch.testing.assert_close(ns_inv({"a": matrix}, 5)["a"], torch.linalg.inv(matrix))


def test_no_terms_are_zero(system):
    assert ns_inv(system[0], 0).count_nonzero() == 0


def test_a_diverging_series_warns():
    with pytest.warns(ti.ConvergenceWarning, match="diverged"):
        ns_inv(4 * torch.eye(2))


@pytest.mark.parametrize("function", [cg, ns, lambda a, b: ns_inv(a)])
@pytest.mark.parametrize("a", [torch.ones(2, 3), torch.ones(2), 3.0])
def test_what_is_no_square_matrix_is_refused(function, a):
    with pytest.raises(TypeError, match="Linear operator must be a"):
        function(a, torch.ones(3))


def test_blocks_must_match_b():
    with pytest.raises(ValueError, match="structure"):
        cg({"u": torch.eye(2)}, (torch.ones(2),))
