"""BiCGSTAB: its denominators, and what becomes of a residual that grows."""

import dataclasses

import pytest
import scipy.sparse.linalg
import torch

from tritonimplicit import Status
from tritonimplicit.linear_solve import BiCGSTAB

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("n", [5, 30, 100])
def test_as_many_iterations_as_scipy(n):
    matrix = torch.eye(n, dtype=DOUBLE) + 0.5 * torch.randn(n, n, dtype=DOUBLE) / n**0.5
    b, calls, theirs = torch.randn(n, dtype=DOUBLE), [], []

    def operator(v):
        theirs.append(1)
        return matrix.numpy() @ v

    def matvec(v):
        calls.append(1)
        return matrix @ v

    linear = scipy.sparse.linalg.LinearOperator((n, n), operator, dtype="float64")
    scipy.sparse.linalg.bicgstab(linear, b.numpy(), rtol=1e-8)
    solution = BiCGSTAB(rtol=1e-8).solve(matvec, b)
    assert solution.status == Status.CONVERGED
    assert len(calls) == 2 * solution.iterations + 1  # the last one verifies
    # SciPy leaves out the second matvec of an iteration whose first is enough.
    assert 2 * solution.iterations - len(theirs) in (0, 1)
    error = (solution.value - torch.linalg.solve(matrix, b)).norm()
    assert error <= 1e-8 * b.norm() * torch.linalg.inv(matrix).norm(2)


def test_a_skew_matrix_breaks_down():
    skew = torch.randn(8, 8, dtype=DOUBLE)
    skew = skew - skew.mT
    solution = BiCGSTAB().solve(lambda v: skew @ v, torch.randn(8, dtype=DOUBLE))
    assert solution.status == Status.BREAKDOWN and solution.value.isfinite().all()


@pytest.mark.parametrize(
    ("matrix", "code"),
    [
        ([[-1.0, 1, 0], [0, -2, -2], [-2, -2, -1]], -10),  # rho vanishes
        ([[2.0, 0, 2], [1, 1, 1], [1, 1, 0]], -11),  # omega vanishes
    ],
)
def test_a_lost_shadow_residual_is_renewed(matrix, code):
    matrix, b = torch.tensor(matrix, dtype=DOUBLE), torch.tensor([1.0, 0, 0], dtype=DOUBLE)
    # SciPy, which does not renew it, breaks down.
    assert scipy.sparse.linalg.bicgstab(matrix.numpy(), b.numpy(), rtol=1e-8)[1] == code
    solution = BiCGSTAB(rtol=1e-8).solve(lambda v: matrix @ v, b)
    assert solution.status == Status.CONVERGED
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-7)


def test_a_residual_that_grows_beyond_all_digits_has_diverged():
    found = set()
    for seed in range(20):
        torch.manual_seed(seed)
        matrix, b = torch.randn(10, 10), torch.randn(10)
        matrix[5:] = 0  # no solution
        solution = BiCGSTAB(maxiter=200).solve(lambda v, m=matrix: m @ v, b)
        found.add(solution.status.item())
        assert solution.value.isfinite().all()
    assert Status.DIVERGED in found and Status.CONVERGED not in found


@pytest.mark.parametrize("batch", [1, 2])
def test_a_matrix_whose_squares_underflow_is_no_error(batch):
    scale = torch.linspace(1, 2, 6, dtype=DOUBLE) * 1e-170
    b = torch.ones(batch, 6, dtype=DOUBLE)
    solver = BiCGSTAB(rtol=0.1, maxiter=100, batch_ndim=1)
    solution = solver.solve(lambda v: scale * v, b)
    assert solution.status.tolist() == [Status.CONVERGED] * batch
    assert (scale * solution.value - b).norm(dim=1).le(0.1 * b.norm(dim=1)).all()


def test_a_solution_that_overflows_is_not_finite():
    # A tiny matrix: the residual of so large an x is small, and no float32 number is x.
    solution = BiCGSTAB(maxiter=3).solve(lambda v: v * 1e-20, torch.full((4,), 1e30))
    assert solution.status == Status.NON_FINITE and solution.value.isnan().all()


class OneBuffer:
    """A map that returns its results in one piece of memory; or in a new one each time."""

    def __init__(self, scale, reuses):
        self.scale, self.out = scale, torch.empty_like(scale) if reuses else None

    def __call__(self, v):
        return torch.mul(self.scale, v, out=self.out)


@pytest.mark.parametrize("ridge", [None, 0.1])
@pytest.mark.parametrize("reused", ["A", "M", "both"])
def test_a_map_may_use_one_buffer_for_all_its_results(reused, ridge):
    scale, b = torch.linspace(1, 3, 32, dtype=DOUBLE), torch.randn(32, dtype=DOUBLE)
    solver = BiCGSTAB(rtol=1e-10, ridge=ridge)

    def solve(*reusing):
        M = OneBuffer(1 / scale.sqrt(), "M" in reusing)
        return dataclasses.replace(solver, M=M).solve(OneBuffer(scale, "A" in reusing), b)

    expected, got = solve(), solve("A" if reused != "M" else "", "M" if reused != "A" else "")
    assert expected.status == Status.CONVERGED and expected.iterations > 3
    assert torch.equal(got.value, expected.value) and got.iterations == expected.iterations


@pytest.mark.parametrize("reusing", ["A", "M"])
def test_a_map_that_comes_to_reuse_its_memory_is_an_error(reusing):
    scale, calls = torch.linspace(1, 3, 32, dtype=DOUBLE), []
    maps = {name: OneBuffer(s, False) for name, s in (("A", scale), ("M", 1 / scale.sqrt()))}

    def compiled_later(v):
        calls.append(1)
        if len(calls) == 4:
            maps[reusing].out = torch.empty_like(scale)
        return maps[reusing](v)

    fns = {**maps, reusing: compiled_later}
    with pytest.raises(RuntimeError, match=r"writes over its last result.*result\.clone\(\)"):
        BiCGSTAB(rtol=1e-10, M=fns["M"]).solve(fns["A"], torch.randn(32, dtype=DOUBLE))


@pytest.mark.parametrize("reuses", [False, True])
def test_a_product_is_copied_only_where_its_memory_is_used_again(reuses, monkeypatch):
    copies, copy = [], torch.Tensor.copy_
    scale, b = torch.linspace(1, 3, 4096, dtype=DOUBLE), torch.randn(4096, dtype=DOUBLE)
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda v, other: (copies.append(v.shape), copy(v, other))[1]
    )
    solution = BiCGSTAB(rtol=1e-10).solve(OneBuffer(scale, reuses), b)
    rows = copies.count(torch.Size([1, 4096])) - 3  # r, p and the shadow residual at the start
    assert rows == (solution.iterations if reuses else 1)
    assert solution.iterations > 3


def test_backend_and_graphs_are_fields_as_cgs():
    assert BiCGSTAB(backend="reference", cuda_graph=True).in_graphs()
    with pytest.raises(ValueError, match="backend must be one of"):
        BiCGSTAB(backend="cuda")
