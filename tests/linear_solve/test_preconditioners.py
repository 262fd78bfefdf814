"""Preconditioners: closed forms, batches, wrong ones, and what they save."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tritonimplicit as ti
from tritonimplicit.linear_solve import CG, Jacobi, Neumann, NormalCG, Nystrom
from tritonimplicit.linear_solve.power import largest_eigenvalue
from tritonimplicit.linear_solve.preconditioners import row_preconditioner
from tritonimplicit.linear_solve.probes import orthonormal
from tritonimplicit.linear_solve.rows import RowMatvec
from tritonimplicit.vectors import Layout

Status = ti.Status
DOUBLE = torch.float64
MS = {"jacobi": Jacobi(), "nystrom": Nystrom(7), "function": lambda r: 0.7 * r}
every_M = pytest.mark.parametrize("M", MS.values(), ids=MS.keys())
SOLVERS = {
    "cg": CG(rtol=1e-9),
    "normal_cg": NormalCG(rtol=1e-9),
    "neumann": Neumann(rtol=1e-9, alpha="estimate", maxiter=4000),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def spd(n, eigenvalues, batch=(), dtype=DOUBLE):
    """Symmetric matrices with these eigenvalues, zero beyond them."""
    q = torch.linalg.qr(torch.randn(*batch, n, n, dtype=DOUBLE))[0][..., : len(eigenvalues)]
    return ((q * eigenvalues) @ q.mT).to(dtype)


def bmv(matrices):
    return lambda v: torch.einsum("...ij,...j->...i", matrices, v)


def on_rows(M, matrix, ridge=None):
    """M as a (B, n, n) matrix, one column at a time; n must be a multiple of 16."""
    layout = Layout.of(matrix[..., 0], 1)
    rows = row_preconditioner(M, RowMatvec(bmv(matrix), layout, ridge))
    identity = torch.eye(layout.n, dtype=matrix.dtype)
    return torch.stack([rows(e.repeat(len(matrix), 1)) for e in identity], 2)


# -- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_probe_finds_a_diagonal_and_one_iteration_solves_it(dtype, sign):
    diagonal = sign * torch.logspace(-6, 6, 40, dtype=dtype)
    b = torch.randn(40, dtype=dtype)
    solution = CG(M=Jacobi(probes=1)).solve(lambda v: diagonal * v, b)
    assert solution.status == Status.CONVERGED and solution.iterations == 1
    # p, alpha and the update are rounded once each.
    torch.testing.assert_close(
        solution.value, b / diagonal, rtol=4 * torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("probes", [1, 7])
def test_jacobi_is_the_mean_of_hutchinsons_samples(probes):
    matrix = spd(16, torch.linspace(1, 2, 16, dtype=DOUBLE), (1,))
    seen = []
    layout = Layout.of(matrix[..., 0], 1)

    def matvec(v):
        seen.append(v.clone())
        return bmv(matrix)(v)

    diagonal = row_preconditioner(Jacobi(probes), RowMatvec(matvec, layout, 0.5)).inverse
    signs = torch.stack(seen)
    assert len(signs) == probes and (signs.abs() == 1).all()
    samples = signs * bmv(matrix + 0.5 * torch.eye(16))(signs)
    mean = samples.mean(0)
    deviation = ((samples - mean) ** 2).mean(0).sqrt() / probes**0.5
    expected = torch.maximum(mean.abs(), deviation)
    torch.testing.assert_close(diagonal, 1 / expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_jacobi_is_positive_and_finite_whatever_the_matrix(scale):
    rough = torch.randn(3, 32, 32)
    rough[0, :, 5] = rough[0, 5] = 0  # a row that no probe sees
    rough[1] = 0
    inverse = on_rows(Jacobi(3), rough * scale).diagonal(dim1=1, dim2=2)
    assert (inverse > 0).all() and inverse.isfinite().all()
    assert inverse[0, 5] == inverse[0].min() and (inverse[1] == 1).all()


@pytest.mark.parametrize("ridge", [0.3, torch.tensor([[0.1], [2.0]], dtype=DOUBLE)], ids=str)
def test_nystrom_is_the_papers_formula(ridge):
    rank, n = 6, 32
    matrix = spd(n, torch.logspace(2, -2, n, dtype=DOUBLE), (2,))
    test = orthonormal(Layout.of(matrix[0, 0]), rank, 0).mT  # (n, rank)
    torch.testing.assert_close(test.mT @ test, torch.eye(rank, dtype=DOUBLE))
    got = on_rows(Nystrom(rank), matrix, ridge)
    for i in range(2):
        shift = float(torch.as_tensor(ridge).reshape(-1)[-1 if i else 0])
        sketch = matrix[i] @ test
        approximation = sketch @ torch.linalg.solve(test.mT @ sketch, sketch.mT)
        values, vectors = torch.linalg.eigh((approximation + approximation.mT) / 2)
        values, u = values[-rank:], vectors[:, -rank:]
        rest = (torch.eye(n, dtype=DOUBLE) - u @ u.mT) / (values[0] + shift)
        expected = (u / (values + shift)) @ u.mT + rest
        # The paper's shift moves eigenvalues by eps ‖A W‖, 1e-10 of the smallest here.
        torch.testing.assert_close(got[i], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [16, 500])
def test_nystrom_of_full_rank_is_the_inverse(rank):
    matrix = spd(16, torch.logspace(0, -2, 16, dtype=DOUBLE), (2,))
    got = on_rows(Nystrom(rank), matrix, 0.1)
    exact = torch.linalg.inv(matrix + 0.1 * torch.eye(16, dtype=DOUBLE))
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    b = torch.randn(2, 16, dtype=DOUBLE)
    solution = CG(rtol=1e-10, ridge=0.1, batch_ndim=1, M=Nystrom(rank)).solve(bmv(matrix), b)
    assert solution.status.tolist() == [0, 0] and (solution.iterations <= 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("kind", ["indefinite", "negative", "zero", "huge", "tiny"])
def test_nystrom_is_symmetric_positive_definite_whatever_the_symmetric_matrix(kind, dtype):
    eigenvalues = torch.logspace(0, -3, 32, dtype=DOUBLE)
    eigenvalues[::2] *= -1 if kind == "indefinite" else 1
    scale = {"indefinite": 1, "negative": -1, "zero": 0, "huge": 1e30, "tiny": 1e-30}[kind]
    got = on_rows(Nystrom(8), (scale * spd(32, eigenvalues, (2,))).to(dtype)).double()
    spectrum = torch.linalg.eigvalsh((got + got.mT) / 2)
    assert (spectrum > 0).all()
    largest = spectrum[:, -1, None, None]
    assert (((got - got.mT) / largest).abs() < 64 * torch.finfo(dtype).eps).all()


# -- what they save --------------------------------------------------------------------------------


def test_low_rank_and_a_ridge_take_a_few_iterations_instead_of_hundreds():
    # 40 eigenvalues over 3 decades, far above the ridge, and a tail below it.
    eigenvalues = torch.cat([torch.logspace(6, 3, 40), torch.logspace(0, -2, 260)]).to(DOUBLE)
    matrix, b = spd(300, eigenvalues), torch.randn(300, dtype=DOUBLE)
    plain = CG(rtol=1e-8, ridge=1.0, maxiter=3000)
    without = plain.solve(bmv(matrix), b)
    with_M = dataclasses.replace(plain, M=Nystrom(50)).solve(bmv(matrix), b)
    assert without.status == with_M.status == Status.CONVERGED
    assert without.iterations > 100 and with_M.iterations <= 20


def test_jacobi_takes_a_spread_diagonal_out():
    n = 200
    spread = 10 ** (2 * torch.rand(n, dtype=DOUBLE))
    noise = torch.randn(n, n, dtype=DOUBLE) / n**0.5
    matrix = spread[:, None] * (torch.eye(n) + 0.1 * (noise + noise.mT)) * spread
    b = torch.randn(n, dtype=DOUBLE)
    without, with_M = (CG(M=M).solve(bmv(matrix), b) for M in (None, Jacobi()))
    assert without.status == with_M.status == Status.CONVERGED
    assert with_M.iterations * 5 < without.iterations


def test_an_exact_inverse_of_the_normal_matrix_solves_the_normal_equations_at_once():
    matrix, b = torch.randn(20, 20, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE)
    inverse = torch.linalg.inv(matrix.mT @ matrix + 0.1 * torch.eye(20, dtype=DOUBLE))
    solution = NormalCG(ridge=0.1, M=bmv(inverse)).solve(bmv(matrix), b)
    assert solution.status == Status.CONVERGED and solution.iterations == 1


def test_the_identity_gives_plain_cgs_iterations():
    matrix = spd(50, torch.linspace(0.01, 1, 50, dtype=DOUBLE))
    b = torch.randn(50, dtype=DOUBLE)
    plain, same = (CG(M=M).solve(bmv(matrix), b) for M in (None, lambda r: r))
    assert abs(int(plain.iterations) - int(same.iterations)) <= 1
    torch.testing.assert_close(plain.value, same.value, rtol=0, atol=2e-3)


def test_preconditioned_richardson_is_the_recursion():
    matrix = spd(6, torch.linspace(0.5, 1, 6, dtype=DOUBLE))
    M = spd(6, torch.linspace(0.5, 1, 6, dtype=DOUBLE))
    b, x = torch.randn(6, dtype=DOUBLE), torch.zeros(6, dtype=DOUBLE)
    for _ in range(8):
        x = x + 0.9 * M @ (b - matrix @ x)
    solution = Neumann(maxiter=7, alpha=0.9, M=bmv(M)).solve(bmv(matrix), b)
    torch.testing.assert_close(solution.value, x)
    torch.testing.assert_close(solution.residual_norm, (b - matrix @ x).norm())


# -- the step length -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_an_estimated_alpha_converges_where_one_diverges(dtype):
    scales = torch.tensor([1e-20, 1e-3, 3.0, 1e5, 1e20], dtype=DOUBLE)
    matrix = scales[:, None, None] * spd(30, torch.linspace(0.2, 1, 30, dtype=DOUBLE), (5,))
    matrix, b = matrix.to(dtype), torch.randn(5, 30, dtype=dtype)
    neumann = Neumann(rtol=1e-5, maxiter=300, batch_ndim=1)
    assert (neumann.solve(bmv(matrix), b).status != Status.CONVERGED).all()
    solution = dataclasses.replace(neumann, alpha="estimate").solve(bmv(matrix), b)
    assert (solution.status == Status.CONVERGED).all()
    residual = b.double() - bmv(matrix.double())(solution.value.double())
    assert (residual.norm(dim=1) <= 1.01e-5 * b.double().norm(dim=1)).all()


def test_the_largest_eigenvalue_is_between_half_and_whole():
    for n in (1, 2, 50, 300):
        eigenvalues = torch.rand(n, dtype=DOUBLE)
        diagonals = eigenvalues[torch.stack([torch.randperm(n) for _ in range(20)])]
        layout = Layout.of(diagonals, 1)
        product = RowMatvec(lambda v, d=diagonals: d * v, layout)
        ratio = largest_eigenvalue(product, layout)
        ratio /= eigenvalues.max()
        assert (ratio > 0.5).all() and (ratio <= 1 + 1e-12).all()


def test_a_zero_matrix_has_no_step_length_and_says_so():
    solution = Neumann(alpha="estimate", rtol=1e-5).solve(lambda v: 0 * v, torch.ones(3))
    assert solution.status == Status.MAX_ITERATIONS and solution.value.isfinite().all()


# -- batches ---------------------------------------------------------------------------------------


@every_solver
@every_M
@pytest.mark.parametrize("n", [20, 1000])
def test_a_batch_is_solved_as_its_systems_alone(solver, M, n):
    solver = dataclasses.replace(solver, rtol=1e-4, M=M)
    scale = torch.rand(3, n, dtype=DOUBLE) + 0.2
    b = torch.randn(3, n, dtype=DOUBLE)
    together = dataclasses.replace(solver, batch_ndim=1).solve(lambda v: v * scale, b)
    for i in range(3):
        alone = solver.solve(lambda v, i=i: v * scale[i], b[i])
        assert torch.equal(alone.value, together.value[i])
        assert alone.iterations == together.iterations[i]
        assert alone.status == together.status[i] == Status.CONVERGED


@every_solver
@every_M
def test_pytrees_and_repeats(solver, M):
    solver = dataclasses.replace(
        solver, M=(lambda r: {"a": r["a"], "b": r["b"]}) if M is MS["function"] else M
    )
    scale = {"a": torch.rand(2, 3) + 0.5, "b": torch.rand(1, dtype=DOUBLE) + 0.5}
    b = {"a": torch.randn(2, 3), "b": torch.randn(1, dtype=DOUBLE)}
    state = torch.get_rng_state()
    matvec = lambda v: {k: v[k] * scale[k] for k in v}  # noqa: E731
    first, second = (dataclasses.replace(solver, rtol=1e-5).solve(matvec, b) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.status == Status.CONVERGED
    for key in b:
        assert torch.equal(first.value[key], second.value[key])
        torch.testing.assert_close(first.value[key], b[key] / scale[key], rtol=2e-4, atol=2e-4)


@every_solver
@every_M
@pytest.mark.parametrize("where", ["A", "b"])
def test_nan_in_one_system_leaves_its_neighbours_alone(solver, M, where):
    solver = dataclasses.replace(solver, M=M, batch_ndim=1)
    scale, b = torch.rand(3, 16, dtype=DOUBLE) + 0.2, torch.randn(3, 16, dtype=DOUBLE)
    clean = solver.solve(lambda v: v * scale, b)
    bad_scale, bad_b = scale.clone(), b.clone()
    (bad_scale if where == "A" else bad_b)[1, 3] = torch.nan
    solution = solver.solve(lambda v: v * bad_scale, bad_b)
    assert solution.status.tolist() == [0, Status.NON_FINITE, 0]
    assert solution.value[1].isnan().all()
    assert torch.equal(solution.value[::2], clean.value[::2])


@pytest.mark.parametrize("check_every", [0, 1, 5])
def test_frozen_systems_are_not_touched(check_every):
    scale = torch.logspace(0, -2, 30, dtype=DOUBLE) ** torch.tensor([[0.0], [1.0], [2.0]])
    b = torch.randn(3, 30, dtype=DOUBLE)
    M = lambda r: r * torch.linspace(1, 2, 30, dtype=DOUBLE)  # noqa: E731
    solver = CG(rtol=1e-8, batch_ndim=1, maxiter=200, M=M)
    expected = solver.solve(lambda v: v * scale, b)
    got = dataclasses.replace(solver, check_every=check_every).solve(lambda v: v * scale, b)
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.iterations, expected.iterations)
    assert len(set(got.iterations.tolist())) == 3 and (got.status == 0).all()


def test_vmap_maps_a_function_too():
    def solve(scale):
        M = lambda r: tuple(t / 2 * torch.ones(4) for t in r)  # noqa: E731
        root = ti.custom_root(lambda x, scale: scale * x - 1, argnums=1, solve=CG(rtol=1e-6, M=M))(
            lambda x, scale: (1 / scale).detach()
        )
        return root(torch.zeros(4), scale).sum()

    scale = torch.rand(4, 4) + 0.5
    gradient = torch.vmap(torch.func.grad(solve))(scale)
    torch.testing.assert_close(gradient, -(scale**-2), rtol=1e-4, atol=1e-4)


# -- precision and scale ---------------------------------------------------------------------------


@every_M
@pytest.mark.parametrize(
    ("scale_a", "scale_b"),  # whose solutions are float32 numbers
    [
        (1e-30, 1e-30),
        (1e-30, 1.0),
        (1.0, 1e-30),
        (1.0, 1.0),
        (1.0, 1e30),
        (1e30, 1.0),
        (1e30, 1e30),
    ],
)
def test_scales_of_fp32(M, scale_a, scale_b):
    if M is MS["function"]:
        M = lambda r: r * (0.7 / scale_a)  # noqa: E731
    matrix = (spd(32, torch.linspace(0.1, 1, 32, dtype=DOUBLE)) * scale_a).float()
    b = (torch.randn(32, dtype=DOUBLE) * scale_b).float()
    solution = CG(M=M).solve(bmv(matrix), b)
    assert solution.status == Status.CONVERGED
    residual = b.double() - matrix.double() @ solution.value.double()
    assert residual.norm() <= 1.02e-5 * b.double().norm()


@every_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_M_its_own_dtype(solver, dtype):
    seen = set()

    def M(r):
        seen.add(r.dtype)
        return r

    scale, b = torch.linspace(0.5, 1.5, 20).to(dtype), torch.randn(20).to(dtype)
    for preconditioner in (M, Jacobi(), Nystrom(3)):
        solution = dataclasses.replace(solver, rtol=1e-3, M=preconditioner).solve(
            lambda v: v * scale, b
        )
        assert solution.value.dtype is dtype
        expected = b.double() / scale.double()
        error = (solution.value.double() - expected).norm() / expected.norm()
        assert error <= 5e-3 + 8 * torch.finfo(dtype).eps
    assert seen == {dtype}


# -- wrong ones ------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize(
    ("M", "error", "message"),
    [
        (lambda r: r[:2], ValueError, r"preconditioner M has a leaf of shape \(2,\)"),
        (lambda r: (r,), TypeError, "preconditioner M has the structure"),
        (lambda r: r.double(), TypeError, "preconditioner M has a leaf of dtype torch.float64"),
        (lambda r: r.mul_(2), RuntimeError, "preconditioner M changed its argument in place"),
        (
            lambda r: r * torch.ones(16, requires_grad=True),
            RuntimeError,
            "preconditioner M requires",
        ),
    ],
)
def test_a_function_that_does_not_fit(solver, M, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(solver, M=M).solve(lambda v: v, torch.ones(16))


@pytest.mark.parametrize("build", [CG, NormalCG, Neumann])
@pytest.mark.parametrize("M", [torch.eye(3), 2.0, Jacobi], ids=str)
def test_M_must_be_a_function_or_an_instance(build, M):
    with pytest.raises(TypeError, match=r"M must be .* Jacobi\(\) or Nystrom\(rank\)"):
        build(M=M)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: Jacobi(0), ValueError),
        (lambda: Jacobi(2.0), TypeError),
        (lambda: Jacobi(seed=-1), ValueError),
        (lambda: Nystrom(0), ValueError),
        (lambda: Nystrom(True), TypeError),
        (lambda: Neumann(alpha="guess"), ValueError),
        (lambda: Neumann(alpha=[1.0]), TypeError),
    ],
)
def test_fields_are_checked(build, error):
    with pytest.raises(error):
        build()


def test_a_negative_definite_M_gives_the_iterates_of_its_negative():
    matrix = spd(16, torch.linspace(0.1, 1, 16, dtype=DOUBLE))
    b, scale = torch.randn(16, dtype=DOUBLE), torch.linspace(1, 2, 16, dtype=DOUBLE)
    positive, negative = (CG(M=lambda r, s=s: s * scale * r).solve(bmv(matrix), b) for s in (1, -1))
    assert positive.status == negative.status == Status.CONVERGED
    assert torch.equal(positive.value, negative.value)
    assert positive.iterations == negative.iterations


@pytest.mark.parametrize("M", [lambda r: 0 * r, lambda r: r * torch.tensor([1.0, -1.0] * 8)])
def test_an_M_that_is_not_definite_is_told_and_the_last_iterate_kept(M):
    matrix = spd(16, torch.linspace(0.01, 1, 16, dtype=DOUBLE), dtype=torch.float32)
    solution = CG(M=M).solve(bmv(matrix), torch.randn(16))
    assert solution.status == Status.PRECONDITIONER and solution.value.isfinite().all()


@every_solver
def test_an_M_of_nan_is_non_finite_in_its_system_alone(solver):
    poison = torch.ones(3, 16, dtype=DOUBLE)
    poison[1, 2] = torch.nan
    scale, b = torch.rand(3, 16, dtype=DOUBLE) + 0.2, torch.randn(3, 16, dtype=DOUBLE)
    solver = dataclasses.replace(solver, batch_ndim=1)
    clean = dataclasses.replace(solver, M=lambda r: r.clone()).solve(lambda v: v * scale, b)
    solution = dataclasses.replace(solver, M=lambda r: r * poison).solve(lambda v: v * scale, b)
    assert solution.status.tolist() == [0, Status.NON_FINITE, 0]
    assert torch.equal(solution.value[::2], clean.value[::2])


@every_M
def test_a_singular_or_indefinite_matrix_is_told_with_M_too(M):
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    b = torch.tensor([0.0, 1.0])
    assert CG(M=lambda r: r).solve(bmv(singular), b).status == Status.BREAKDOWN
    indefinite = torch.tensor([1.0, 2.0, -3.0, 0.5])
    assert CG(M=M).solve(lambda v: v * indefinite, torch.ones(4)).status == Status.INDEFINITE


def test_a_forced_backend_is_not_replaced_in_silence():
    for M in (Nystrom(3), lambda r: r):
        with pytest.raises(RuntimeError, match="preconditioner"):
            CG(backend="triton", M=M)(lambda v: v, torch.ones(3))
    with pytest.raises(RuntimeError, match="cannot run on cpu"):
        CG(backend="triton", M=Jacobi())(lambda v: v, torch.ones(3))


@st.composite
def problems(draw):
    """(matrix (B, n, n), b (B, n)), symmetric of every kind, in float32 or float64."""
    n, batch = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["spd", "spd", "negative", "indefinite", "singular", "general"]))
    dtype = draw(st.sampled_from([torch.float32, DOUBLE]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    q = torch.randn(batch, n, n, dtype=DOUBLE, generator=generator)
    eigenvalues = 10.0 ** -torch.linspace(0, draw(st.integers(0, 6)), n, dtype=DOUBLE)
    if kind == "negative":
        eigenvalues = -eigenvalues
    if kind == "indefinite":
        eigenvalues[::2] *= -1
    if kind == "singular":
        eigenvalues[-1] = 0
    u = torch.linalg.qr(q)[0]
    matrix = q if kind == "general" else (u * eigenvalues) @ u.mT
    matrix = matrix * draw(st.sampled_from([1e-12, 1.0, 1e12]))
    b = torch.randn(batch, n, dtype=DOUBLE, generator=generator)
    b = b * draw(st.sampled_from([0.0, 1e-20, 1.0, 1e20]))
    if draw(st.sampled_from([False, False, False, True])):
        (matrix if draw(st.booleans()) else b).view(-1)[0] = torch.nan
    return matrix.to(dtype), b.to(dtype)


preconditioners = st.one_of(
    st.builds(Jacobi, probes=st.integers(1, 4), seed=st.integers(0, 3)),
    st.builds(Nystrom, rank=st.integers(1, 14), seed=st.integers(0, 3)),
    st.sampled_from([lambda r: r, lambda r: -r, lambda r: r * 1e-9, lambda r: r.flip(-1)]),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    problem=problems(),
    M=preconditioners,
    solver=st.sampled_from([CG, NormalCG, Neumann]),
    alpha=st.sampled_from([None, "estimate"]),
    ridge=st.sampled_from([None, 0.5]),
    rtol=st.sampled_from([0.0, 1e-3, 1e-6]),
)
def test_never_silently_wrong(problem, M, solver, alpha, ridge, rtol):
    matrix, b = problem
    fields = {"alpha": alpha} if solver is Neumann else {}
    solver = solver(rtol=rtol, maxiter=40, batch_ndim=1, ridge=ridge, M=M, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver.solve(lambda v: (matrix @ v[..., None])[..., 0], b)
    eps, exact, rhs = torch.finfo(b.dtype).eps, matrix.double(), b.double()
    x, n = solution.value.double(), b.shape[1]
    # The solver judges by products in its own precision: they round by 4 n eps |A| |x|.
    absolute = exact.abs()
    if isinstance(solver, NormalCG):
        rhs, size = bmv(exact.mT)(rhs), bmv(absolute.mT)(rhs.abs())
        exact, absolute = exact.mT @ exact, absolute.mT @ absolute
    else:
        size = rhs.abs()
    shift = 0.0 if ridge is None else ridge
    residual = rhs - bmv(exact)(x) - shift * x
    rounding = 8 * n * eps * (bmv(absolute)(x.abs()) + shift * x.abs() + size)
    met = residual.norm(dim=1) <= max(rtol, eps) * 1.001 * rhs.norm(dim=1) + rounding.norm(dim=1)
    converged = solution.status == Status.CONVERGED
    assert met[converged].all()
    finite = matrix.isfinite().all(2).all(1) & b.isfinite().all(1)
    assert (solution.status[~finite] == Status.NON_FINITE).all()
    assert x[solution.status == Status.NON_FINITE].isnan().all()
