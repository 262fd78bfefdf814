"""What GMRES, BiCGSTAB and MINRES have in common; each has a file for what is its own."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tritonimplicit as ti
from tritonimplicit.linear_solve import (
    GMRES,
    MINRES,
    BiCGSTAB,
    solve_bicgstab,
    solve_gmres,
    solve_minres,
)

Status = ti.Status
DOUBLE = torch.float64
SOLVERS = {
    "gmres": GMRES(rtol=1e-10),
    "gmres(5)": GMRES(rtol=1e-10, restart=5, maxiter=2000),
    "bicgstab": BiCGSTAB(rtol=1e-10),
    "minres": MINRES(rtol=1e-10),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def symmetric(eigenvalues):
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=DOUBLE))[0]
    return (q * eigenvalues) @ q.mT


def bmv(matrices):
    return lambda v: torch.einsum("...ij,...j->...i", matrices, v)


def spectra(systems, n):
    """(systems, n) diagonals of condition 1 to 1e3."""
    conditions = torch.logspace(0, 3, systems, dtype=DOUBLE)
    return conditions[:, None] ** -torch.linspace(0, 1, n, dtype=DOUBLE)


@every_solver
@pytest.mark.parametrize("n", [1, 7, 64])
def test_solves_and_reports_the_true_residual(solver, n):
    matrix, b = symmetric(torch.linspace(1, 10, n, dtype=DOUBLE)), torch.randn(n, dtype=DOUBLE)
    solution = solver.solve(bmv(matrix), b)
    assert solution.status.item() == Status.CONVERGED
    assert (solution.value - torch.linalg.solve(matrix, b)).norm() <= 1e-10 * b.norm()
    outside = (b - matrix @ solution.value).norm()
    rounding = 10 * n * torch.finfo(DOUBLE).eps * 10 * solution.value.norm()
    assert abs(solution.residual_norm - outside) <= rounding


@every_solver
def test_a_batch_of_mixed_conditioning_is_solved_as_its_systems_alone(solver):
    diagonals, b = spectra(8, 30), torch.randn(8, 30, dtype=DOUBLE)
    together = dataclasses.replace(solver, batch_ndim=1).solve(lambda v: v * diagonals, b)
    assert together.iterations.unique().numel() > 5
    for i in range(8):
        alone = solver.solve(lambda v, i=i: v * diagonals[i], b[i])
        assert torch.equal(alone.value, together.value[i])
        assert alone.iterations == together.iterations[i]
        assert alone.status == together.status[i]


@every_solver
def test_as_many_iterations_as_distinct_eigenvalues(solver):
    diagonal = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=DOUBLE).repeat_interleave(8)
    solution = solver.solve(lambda v: diagonal * v, torch.ones(32, dtype=DOUBLE))
    assert solution.status == Status.CONVERGED and solution.iterations == 4


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(solver, dtype):
    scale, b = torch.linspace(0.5, 1.5, 20, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE)
    # Products that round to `dtype` say nothing of a residual below that.
    rtol = max(1e-3, 4 * torch.finfo(dtype).eps)
    solution = dataclasses.replace(solver, rtol=rtol).solve(
        lambda v: v * scale.to(dtype), b.to(dtype)
    )
    assert solution.value.dtype is dtype and solution.status == Status.CONVERGED
    error = (solution.value.double() - b / scale).norm() / (b / scale).norm()
    # rtol times the condition, and the rounding of A, b, A's results and x to `dtype`.
    assert error <= 3 * rtol + 8 * torch.finfo(dtype).eps


@every_solver
@pytest.mark.parametrize(
    ("a", "size"),
    [(1e-30, 1e-30), (1e-30, 1.0), (1.0, 1e-30), (1.0, 1e30), (1e30, 1.0), (1e30, 1e30)],
)
def test_huge_and_tiny_numbers_in_fp32(solver, a, size):
    diagonal = torch.linspace(0.5, 1.5, 20)
    b = torch.randn(20)
    x = b.double() / diagonal.double() * (size / a)
    solution = dataclasses.replace(solver, rtol=1e-5).solve(lambda v: v * (diagonal * a), b * size)
    assert solution.status == Status.CONVERGED
    # The condition is 3.
    assert (solution.value.double() - x).norm() <= 3e-5 * 1.01 * x.norm()


@every_solver
def test_pytrees_of_odd_sizes_in_a_batch(solver):
    matrix = torch.stack([symmetric(torch.linspace(1, k, 7, dtype=DOUBLE)) for k in (2, 3, 9)])
    b = {"a": torch.randn(3, 3, 1, dtype=DOUBLE), "b": [torch.randn(3, 4, dtype=DOUBLE)], "c": None}

    def flat(v):
        return torch.cat([v["a"].flatten(1), v["b"][0]], 1)

    def matvec(v):
        y = bmv(matrix)(flat(v))
        return {"a": y[:, :3, None], "b": [y[:, 3:]], "c": None}

    solution = dataclasses.replace(solver, batch_ndim=1).solve(matvec, b)
    assert (solution.status == Status.CONVERGED).all() and solution.value["c"] is None
    expected = torch.linalg.solve(matrix, flat(b))
    assert ((flat(solution.value) - expected).norm(dim=1) <= 1e-10 * flat(b).norm(dim=1)).all()


@every_solver
def test_starts(solver):
    x = torch.randn(16, dtype=DOUBLE)
    zero = solver.solve(lambda v: 2 * v, torch.zeros(16, dtype=DOUBLE))
    assert zero.value.tolist() == [0] * 16
    assert zero.status == Status.CONVERGED and zero.iterations == 0
    from_x = dataclasses.replace(solver, init=x)
    assert from_x(lambda v: 2 * v, torch.zeros(16, dtype=DOUBLE)).tolist() == [0] * 16
    exact = from_x.solve(lambda v: 0.5 * v, 0.5 * x)
    assert torch.equal(exact.value, x) and exact.iterations == 0
    assert exact.status == Status.CONVERGED
    far = from_x.solve(lambda v: 0.5 * v, torch.ones(16, dtype=DOUBLE))
    torch.testing.assert_close(far.value, torch.full_like(x, 2.0), rtol=1e-9, atol=0)


@every_solver
def test_the_matvec_may_return_its_argument_or_one_buffer_always(solver):
    b, kept = torch.randn(32), torch.zeros(32)
    solver = dataclasses.replace(solver, rtol=1e-6)
    torch.testing.assert_close(solver(lambda v: v, b), b)
    scale = torch.linspace(1, 2, 32)
    torch.testing.assert_close(solver(lambda v: torch.mul(v, scale, out=kept), b), b / scale)


@every_solver
@pytest.mark.parametrize("maxiter", [0, 1, 3])
def test_maxiter_ends_the_solve(solver, maxiter):
    diagonal, b = spectra(2, 40)[1], torch.randn(40, dtype=DOUBLE)
    solution = dataclasses.replace(solver, maxiter=maxiter).solve(lambda v: v * diagonal, b)
    assert solution.status == Status.MAX_ITERATIONS and solution.iterations == maxiter
    assert torch.allclose(solution.residual_norm, (b - diagonal * solution.value).norm())


@every_solver
@pytest.mark.parametrize("check_every", [0, 1, 3, 7])
def test_check_every_changes_when_the_host_looks_and_not_the_result(solver, check_every):
    diagonals, b = torch.rand(3, 20, dtype=DOUBLE) + 0.2, torch.randn(3, 20, dtype=DOUBLE)
    solver = dataclasses.replace(solver, batch_ndim=1, maxiter=300)
    expected = solver.solve(lambda v: v * diagonals, b)
    got = dataclasses.replace(solver, check_every=check_every).solve(lambda v: v * diagonals, b)
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.iterations, expected.iterations)
    assert (got.status == Status.CONVERGED).all()


class HostReads(TorchDispatchMode):
    """Collects the operations whose result, or its shape, the host must wait for."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        if name in self.WAITS or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@every_solver
@pytest.mark.parametrize("M", [None, lambda v: 0.5 * v], ids=["plain", "preconditioned"])
def test_the_host_reads_nothing(solver, M):
    solver = dataclasses.replace(solver, check_every=0, maxiter=30, batch_ndim=1, M=M)
    diagonals, b = torch.rand(3, 20) + 0.2, torch.randn(3, 20)
    with HostReads() as reads:
        solver.solve(lambda v: v * diagonals, b)
    assert reads.seen == []
    with HostReads() as reads:  # which the mode can see
        dataclasses.replace(solver, check_every=None).solve(lambda v: v * diagonals, b)
    assert reads.seen


@every_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["b", "A"])
def test_a_non_finite_system_is_nan_and_its_neighbours_are_not_disturbed(solver, bad, where):
    scale = torch.linspace(0.5, 1.5, 16, dtype=DOUBLE).repeat(3, 1)
    b = torch.randn(3, 16, dtype=DOUBLE)
    solver = dataclasses.replace(solver, batch_ndim=1)
    clean = solver.solve(lambda v: v * scale, b)
    broken_scale, broken_b = scale.clone(), b.clone()
    (broken_scale if where == "A" else broken_b)[1, 3] = bad
    solution = solver.solve(lambda v: v * broken_scale, broken_b)
    assert solution.status.tolist() == [0, Status.NON_FINITE, 0]
    assert solution.value[1].isnan().all() and solution.residual_norm[1].isnan()
    assert torch.equal(solution.value[::2], clean.value[::2])


@every_solver
def test_what_a_matvec_does_to_a_stopped_system_does_not_reach_it(solver):
    diagonals, b = spectra(2, 30), torch.randn(2, 30, dtype=DOUBLE)
    solver = dataclasses.replace(solver, batch_ndim=1, maxiter=500)
    calls, expected = [], solver.solve(lambda v: v * diagonals, b)
    assert expected.iterations[0] == 1

    def poisoning(v):
        calls.append(1)
        av = v * diagonals
        if 2 < len(calls) < 8:  # the first system has stopped, and is not yet verified
            av[0] = math.nan
        return av

    solution = solver.solve(poisoning, b)
    assert torch.equal(solution.value, expected.value)
    assert torch.equal(solution.status, expected.status)


@every_solver
def test_a_matrix_of_zeros_breaks_down(solver):
    solution = solver.solve(lambda v: 0 * v, torch.ones(5))
    assert solution.status == Status.BREAKDOWN and solution.iterations == 0
    assert solution.value.tolist() == [0] * 5


@every_solver
def test_singular_systems(solver):
    diagonal = torch.cat([torch.linspace(0.5, 2, 9, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)])
    x = torch.randn(12, dtype=DOUBLE) * (diagonal > 0)
    consistent = solver.solve(lambda v: diagonal * v, diagonal * x)
    assert consistent.status == Status.CONVERGED
    assert (consistent.value - x).norm() <= 1e-10 * (diagonal * x).norm() / 0.5
    incompatible = solver.solve(lambda v: diagonal * v, torch.ones(12, dtype=DOUBLE))
    assert incompatible.status != Status.CONVERGED


@every_solver
@pytest.mark.parametrize("ridge", [0.3, torch.tensor([0.3, 0.6])], ids=str)
def test_ridge(solver, ridge):
    matrix = symmetric(torch.linspace(1, 2, 6, dtype=DOUBLE)).expand(2, 6, 6)
    b = torch.randn(2, 6, dtype=DOUBLE)
    shift = torch.as_tensor(ridge, dtype=DOUBLE).expand(2)[:, None, None] * torch.eye(6)
    x = dataclasses.replace(solver, batch_ndim=1, ridge=ridge)(bmv(matrix), b)
    torch.testing.assert_close(x, torch.linalg.solve(matrix + shift, b), rtol=1e-9, atol=1e-9)


@every_solver
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_preconditioner_saves_iterations_and_tests_the_residual_of_the_system(solver, scale):
    size = torch.logspace(0, 4, 60, dtype=DOUBLE)
    near = symmetric(torch.linspace(0.5, 1.5, 60, dtype=DOUBLE))
    matrix = size.sqrt()[:, None] * near * size.sqrt()
    b = torch.randn(60, dtype=DOUBLE)
    # A multiple of a preconditioner is as good as it.
    better = dataclasses.replace(solver, M=lambda v: v * (scale / size), maxiter=1000)
    plain, preconditioned = solver.solve(bmv(matrix), b), better.solve(bmv(matrix), b)
    assert preconditioned.status == Status.CONVERGED
    assert 2 * preconditioned.iterations < plain.iterations
    residual = (b - matrix @ preconditioned.value).norm()
    rounding = (
        10 * 60 * torch.finfo(DOUBLE).eps * (matrix.abs() @ preconditioned.value.abs()).norm()
    )
    assert abs(residual - preconditioned.residual_norm) <= rounding
    assert preconditioned.residual_norm <= 1e-10 * b.norm()


@every_solver
def test_the_inverse_as_preconditioner_needs_one_iteration(solver):
    scale, b = torch.linspace(1, 9, 20, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE)
    solution = dataclasses.replace(solver, M=lambda v: v / scale).solve(lambda v: v * scale, b)
    assert solution.status == Status.CONVERGED and solution.iterations == 1


@every_solver
def test_autocast_does_not_reach_the_vectors(solver):
    scale, b = torch.linspace(1, 9, 20, dtype=torch.float32), torch.randn(20)
    solver = dataclasses.replace(solver, rtol=1e-6)
    expected = solver.solve(lambda v: v * scale, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solver.solve(lambda v: v * scale, b)
    assert torch.equal(solution.value, expected.value)
    assert solution.status == Status.CONVERGED


@pytest.mark.parametrize(
    ("factory", "cls"), [(solve_gmres, GMRES), (solve_bicgstab, BiCGSTAB), (solve_minres, MINRES)]
)
def test_factories(factory, cls):
    assert factory(matvec=None, b=None, rtol=1e-3) == cls(rtol=1e-3)
    with pytest.raises(TypeError, match="tol"):
        factory(tol=1e-3)
