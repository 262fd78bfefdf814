"""What holds for every solver: right solutions, true residuals, statuses, batches, pytrees."""

import dataclasses

import pytest
import torch

import tritonimplicit as ti
from tritonimplicit.linear_solve import CG, Dense, Neumann, NormalCG

Status = ti.Status
DOUBLE = torch.float64


def spd(n, cond=10.0, batch=(), dtype=DOUBLE):
    """Symmetric positive definite matrices with eigenvalues from 1/cond to 1."""
    q = torch.linalg.qr(torch.randn(*batch, n, n, dtype=DOUBLE))[0]
    eigenvalues = torch.linspace(1 / cond, 1, n, dtype=DOUBLE)
    return ((q * eigenvalues) @ q.mT).to(dtype)


def bmv(matrices):
    return lambda v: torch.einsum("...ij,...j->...i", matrices, v)


SOLVERS = {
    "cg": CG(rtol=1e-10),
    "normal_cg": NormalCG(rtol=1e-10),
    "neumann": Neumann(rtol=1e-10, maxiter=1000),
    "dense": Dense(),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
iterative = pytest.mark.parametrize(
    "solver", [SOLVERS[name] for name in ("cg", "normal_cg", "neumann")], ids=str
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def true_residual(solver, matrix, x, b):
    residual = b - bmv(matrix)(x)
    return (bmv(matrix.mT)(residual) if isinstance(solver, NormalCG) else residual).norm(dim=-1)


@every_solver
@pytest.mark.parametrize("n", [1, 7, 64])
def test_solves_and_reports_the_true_residual(solver, n):
    matrix, b = spd(n), torch.randn(n, dtype=DOUBLE)
    solution = solver.solve(bmv(matrix), b)
    assert solution.status.item() == Status.CONVERGED
    assert solution.status.shape == solution.iterations.shape == solution.residual_norm.shape == ()
    # ‖x - A^-1 b‖ <= ‖A^-1‖ ‖residual‖, and cond is 10 (its square for the normal equations).
    assert (solution.value - torch.linalg.solve(matrix, b)).norm() <= 1e-8 * b.norm()
    outside = true_residual(solver, matrix, solution.value, b)
    # Two evaluations of one residual differ by rounding: n eps ‖A‖ ‖x‖.
    rounding = 10 * n * torch.finfo(DOUBLE).eps * solution.value.norm()
    assert abs(solution.residual_norm - outside) <= rounding


@every_solver
def test_calling_returns_the_value_of_solve(solver):
    matrix, b = spd(9), torch.randn(9, dtype=DOUBLE)
    assert torch.equal(solver(bmv(matrix), b), solver.solve(bmv(matrix), b).value)


@every_solver
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_a_batch_is_solved_as_its_systems_alone(solver, batch):
    # Diagonal matrices: their products round alike alone and in a batch.
    matrix = torch.diag_embed(torch.rand(*batch, 20, dtype=DOUBLE) + 0.2)
    b = torch.randn(*batch, 20, dtype=DOUBLE)
    together = dataclasses.replace(solver, batch_ndim=len(batch)).solve(bmv(matrix), b)
    assert together.status.shape == batch
    for index in torch.cartesian_prod(*map(torch.arange, batch)).reshape(-1, len(batch)):
        i = tuple(index.tolist())
        alone = solver.solve(bmv(matrix[i]), b[i])
        assert torch.equal(alone.value, together.value[i])
        assert alone.iterations == together.iterations[i]
        assert alone.status == together.status[i] == Status.CONVERGED


@every_solver
def test_pytrees_keep_their_structure(solver):
    matrix = spd(4)
    half = torch.tensor(0.5, dtype=DOUBLE)
    b = {"a": torch.randn(2, 2, dtype=DOUBLE), "b": [half.clone()], "c": None}

    def matvec(v):
        return {"a": (matrix @ v["a"].reshape(4)).view(2, 2), "b": [half * v["b"][0]], "c": None}

    x = solver(matvec, b)
    torch.testing.assert_close(
        x["a"].reshape(4), torch.linalg.solve(matrix, b["a"].reshape(4)), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(x["b"][0], torch.tensor(1.0, dtype=DOUBLE), rtol=1e-8, atol=0)
    assert x["c"] is None
    x["a"].detach_()  # which a view of a shared buffer would refuse


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(solver, dtype):
    solver = solver if isinstance(solver, Dense) else dataclasses.replace(solver, rtol=1e-3)
    scale = torch.linspace(0.5, 1.5, 20, dtype=DOUBLE)
    b = torch.randn(20, dtype=DOUBLE)
    solution = solver.solve(lambda v: v * scale.to(dtype), b.to(dtype))
    assert solution.value.dtype is dtype
    # rtol, the rounding of A and b, and of A's results (to `dtype`; twice in the normal equations).
    error = (solution.value.double() - b / scale).norm() / (b / scale).norm()
    assert error <= 5e-3 + 8 * torch.finfo(dtype).eps


@every_solver
@pytest.mark.parametrize("ridge", [0.3, torch.tensor(0.3), torch.tensor([0.3, 0.6])], ids=str)
def test_ridge(solver, ridge):
    matrix, b = spd(6, batch=(2,)), torch.randn(2, 6, dtype=DOUBLE)
    system = matrix.mT @ matrix if isinstance(solver, NormalCG) else matrix
    rhs = bmv(matrix.mT)(b) if isinstance(solver, NormalCG) else b
    shift = torch.as_tensor(ridge, dtype=DOUBLE).expand(2)[:, None, None] * torch.eye(6)
    x = dataclasses.replace(solver, batch_ndim=1, ridge=ridge)(bmv(matrix), b)
    torch.testing.assert_close(x, torch.linalg.solve(system + shift, rhs), rtol=1e-8, atol=1e-8)


@every_solver
def test_the_matvec_may_return_its_argument(solver):
    b = torch.randn(32)
    torch.testing.assert_close(solver(lambda v: v, b), b)


def test_what_the_matvec_returns_is_not_written_to():
    b, kept, results = torch.randn(32), torch.zeros(32), []

    def matvec(v):
        results.append(v.clone())
        return kept.copy_(v)

    for solver in (CG(ridge=0.1), Neumann(ridge=0.1, maxiter=20), Dense(ridge=0.1)):
        torch.testing.assert_close(solver(matvec, b), b / 1.1)
        assert torch.equal(kept, results[-1])


@every_solver
def test_zero_b_gives_zero(solver):
    solution = solver.solve(bmv(spd(5)), torch.zeros(5, dtype=DOUBLE))
    assert solution.value.tolist() == [0] * 5 and solution.status == Status.CONVERGED


@iterative
def test_an_exact_initial_guess_is_kept(solver):
    x = torch.randn(16, dtype=DOUBLE)
    solution = dataclasses.replace(solver, init=x).solve(lambda v: 0.5 * v, 0.5 * x)
    assert torch.equal(solution.value, x) and solution.iterations == 0
    assert solution.status == Status.CONVERGED


@iterative
def test_a_good_initial_guess_saves_iterations(solver):
    matrix, b = spd(30, cond=30.0), torch.randn(30, dtype=DOUBLE)
    exact = torch.linalg.solve(matrix, b)
    near = dataclasses.replace(solver, init=exact + 1e-6 * torch.randn(30, dtype=DOUBLE))
    cold, warm = solver.solve(bmv(matrix), b), near.solve(bmv(matrix), b)
    assert warm.status == Status.CONVERGED and warm.iterations < cold.iterations
    torch.testing.assert_close(warm.value, exact, rtol=1e-7, atol=1e-7)


@iterative
def test_zero_b_from_another_initial_guess_is_zero(solver):
    guess = dataclasses.replace(solver, init=torch.ones(4))
    assert guess(lambda v: v, torch.zeros(4)).tolist() == [0] * 4


@iterative
@pytest.mark.parametrize("maxiter", [0, 1, 3])
def test_maxiter_ends_the_solve(solver, maxiter):
    matrix, b = spd(40, cond=100.0), torch.randn(40, dtype=DOUBLE)
    solution = dataclasses.replace(solver, maxiter=maxiter).solve(bmv(matrix), b)
    assert solution.status == Status.MAX_ITERATIONS and solution.iterations == maxiter


@iterative
@pytest.mark.parametrize("check_every", [0, 1, 3, 7])
def test_check_every_changes_when_the_host_looks_and_not_the_result(solver, check_every):
    matrix = torch.diag_embed(torch.rand(3, 20, dtype=DOUBLE) + 0.2)
    b = torch.randn(3, 20, dtype=DOUBLE)
    solver = dataclasses.replace(solver, batch_ndim=1, maxiter=300)
    expected = solver.solve(bmv(matrix), b)
    got = dataclasses.replace(solver, check_every=check_every).solve(bmv(matrix), b)
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.iterations, expected.iterations)
    assert (got.status == Status.CONVERGED).all()


@pytest.mark.parametrize(("solver", "per_iteration"), [(CG(), 1), (NormalCG(), 1), (Neumann(), 1)])
def test_no_matvec_is_wasted(solver, per_iteration):
    matrix, calls = spd(30), []

    def matvec(v):
        calls.append(1)
        return bmv(matrix)(v)

    # Converged: one matvec more, for the true residual; normal CG records the transpose once.
    converged = dataclasses.replace(solver, rtol=1e-6, maxiter=500)
    solution = converged.solve(matvec, torch.randn(30, dtype=DOUBLE))
    recording = isinstance(solver, NormalCG)
    assert len(calls) == per_iteration * solution.iterations + 1 + recording
    # Nothing claims convergence: CG trusts its recurrence, and makes exactly maxiter of them.
    calls.clear()
    stopped = dataclasses.replace(solver, rtol=0.0, maxiter=5)
    stopped.solve(matvec, torch.randn(30, dtype=DOUBLE))
    assert len(calls) == 5 * per_iteration + (1 if isinstance(solver, Neumann) else recording)


@every_solver
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
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


def test_cg_stops_each_system_by_its_own_criterion():
    conds = torch.logspace(0, 4, 20, dtype=DOUBLE)
    diagonals = conds[:, None] ** -torch.linspace(0, 1, 50, dtype=DOUBLE)
    b = torch.randn(20, 50, dtype=DOUBLE)
    solution = CG(rtol=1e-6, maxiter=40, batch_ndim=1).solve(lambda v: v * diagonals, b)
    residual = (b - diagonals * solution.value).norm(dim=1)
    converged = solution.status == Status.CONVERGED
    assert torch.equal(converged, residual <= 1e-6 * b.norm(dim=1))
    assert converged[0] and not converged[-1]
    assert (solution.status[~converged] == Status.MAX_ITERATIONS).all()
    assert solution.iterations[0] == 1 and solution.iterations[-1] == 40


def test_cg_solves_negative_definite_systems():
    matrix, b = -spd(20), torch.randn(20, dtype=DOUBLE)
    x = CG(rtol=1e-10)(bmv(matrix), b)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)


def test_cg_says_that_a_matrix_is_indefinite():
    diagonal = torch.tensor([1.0, 2.0, -3.0, 0.5])
    with pytest.warns(ti.ConvergenceWarning, match="solve_minres or solve_gmres"):
        x = CG()(lambda v: diagonal * v, torch.ones(4))
    assert x.isfinite().all()


def test_singular_matrices_break_down():
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    only_null = torch.tensor([0.0, 1.0])
    assert CG().solve(bmv(singular), only_null).status == Status.BREAKDOWN
    dense = Dense().solve(bmv(singular), only_null)
    assert dense.status == Status.BREAKDOWN and dense.value.isnan().all()


def test_dense_reports_an_ill_conditioned_matrix():
    hilbert = 1 / (torch.arange(12.0)[:, None] + torch.arange(12.0) + 1)
    solution = Dense().solve(bmv(hilbert), torch.ones(12))
    relative = (hilbert.double() @ solution.value.double() - 1).norm() / 12**0.5
    met = relative <= torch.finfo(torch.float32).eps ** 0.5
    assert (solution.status == Status.CONVERGED) == met


def test_neumann_says_that_it_diverges_and_names_the_sign():
    contraction = 0.5 * torch.linalg.qr(torch.randn(8, 8))[0]
    wrong_sign = lambda v: contraction @ v - v  # noqa: E731
    with pytest.warns(ti.ConvergenceWarning, match=r"z - f\(z\), not of f\(z\) - z"):
        Neumann()(wrong_sign, torch.ones(8))
    assert Neumann(maxiter=500).solve(wrong_sign, torch.ones(8)).status == Status.DIVERGED


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_neumann_is_the_truncated_series(alpha):
    matrix, b = spd(6), torch.randn(6, dtype=DOUBLE)
    a = 1.0 if alpha is None else alpha
    step = torch.eye(6, dtype=DOUBLE) - a * matrix
    terms = [torch.linalg.matrix_power(step, k) @ b for k in range(8)]
    torch.testing.assert_close(Neumann(maxiter=7, alpha=alpha)(bmv(matrix), b), a * sum(terms))


def test_cg_in_fp32_reaches_its_tolerance_truly_or_says_that_it_does_not():
    for cond in (1e2, 1e4, 1e6):
        matrix = spd(100, cond=cond, dtype=torch.float32)
        b = torch.randn(100)
        solution = CG(rtol=1e-6, maxiter=2000).solve(bmv(matrix), b)
        # The working precision's own product judges; fp64 differs from it by rounding of A x.
        residual = (b - matrix @ solution.value).norm()
        if solution.status == Status.CONVERGED:
            assert residual <= 1e-6 * b.norm() * (1 + 1e-4)
        else:
            assert solution.status in (Status.STAGNATED, Status.MAX_ITERATIONS)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_huge_and_tiny_right_hand_sides_in_fp32(scale):
    matrix, b = spd(20, dtype=torch.float32), torch.randn(20)
    plain = CG().solve(bmv(matrix), b)
    scaled = CG().solve(bmv(matrix), b * scale)
    assert scaled.status == Status.CONVERGED
    torch.testing.assert_close(scaled.value / scale, plain.value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", [CG(), NormalCG(), Neumann(rtol=1e-5)], ids=str)
def test_float64_numbers_whose_squares_vanish_are_not_called_converged(solver):
    solution = solver.solve(lambda v: v, torch.full((3,), 1e-165, dtype=DOUBLE))
    assert solution.status == Status.BREAKDOWN


def test_the_residual_of_a_stagnated_system_is_the_true_one():
    """Also where another system restarts, and then nothing claims convergence any more."""
    for seed in range(20):
        torch.manual_seed(seed)
        matrix = torch.stack([spd(30, cond, dtype=torch.float32) for cond in (1e4, 1e5, 1e6)])
        b = torch.randn(3, 30)
        solution = CG(rtol=1e-7, maxiter=150, batch_ndim=1).solve(bmv(matrix), b)
        stagnated = solution.status == Status.STAGNATED
        assert (solution.residual_norm[stagnated] > 1e-7 * b.norm(dim=1)[stagnated]).all()


def test_no_tolerance_ends_at_rounding_and_without_nan_or_warning():
    matrix, b = spd(6, dtype=torch.float32), torch.randn(6)
    x = CG(rtol=0.0, atol=0.0, maxiter=200)(bmv(matrix), b)
    assert x.isfinite().all()


def test_absolute_tolerance():
    matrix, b = spd(30), torch.randn(30, dtype=DOUBLE)
    solution = CG(rtol=0.0, atol=1e-3).solve(bmv(matrix), b)
    assert solution.status == Status.CONVERGED and 1e-9 < solution.residual_norm <= 1e-3


def test_reaching_the_default_maxiter_warns_and_a_chosen_one_does_not():
    # 2,000 eigenvalues over 7 decades: far more than the default's 1,000 iterations.
    scale = torch.logspace(0, -7, 2000, dtype=DOUBLE)
    b = torch.randn(2000, dtype=DOUBLE)
    with pytest.warns(ti.ConvergenceWarning, match="raise maxiter"):
        CG()(lambda v: scale * v, b)
    CG(maxiter=20)(lambda v: scale * v, b)


@every_solver
def test_a_value_too_large_for_its_dtype_is_not_finite(solver):
    """In the solver's float32 it is; in the float16 of b it would be infinite, and CONVERGED."""
    scale = torch.tensor([1.0, 1e-5], dtype=torch.float16)[:, None]
    solver = dataclasses.replace(solver, batch_ndim=1, ridge=None)
    if isinstance(solver, Neumann):
        solver = dataclasses.replace(solver, alpha="estimate")
    solution = solver.solve(lambda v: scale * v, torch.full((2, 3), 2.0, dtype=torch.float16))
    assert solution.status[0] == Status.CONVERGED and solution.value[0].tolist() == [2.0] * 3
    if isinstance(solver, NormalCG):  # A^T A underflows
        assert solution.status[1] == Status.BREAKDOWN
    else:
        assert solution.status[1] == Status.NON_FINITE and solution.value[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cg_on_a_matrix_that_is_not_symmetric_says_that_it_diverges(dtype):
    rotation = torch.tensor([[1.0, 3.0], [-3.0, 1.0]], dtype=dtype)  # v.Av is positive all the same
    b = torch.tensor([1.0, 0.0], dtype=dtype)
    solver = CG(maxiter=40)
    assert solver.solve(lambda v: rotation @ v, b).status == Status.DIVERGED
    with pytest.warns(ti.ConvergenceWarning, match="symmetric definite"):
        solver(lambda v: rotation @ v, b)
