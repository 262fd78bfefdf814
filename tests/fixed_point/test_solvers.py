"""The solvers of fixed points: where they converge, when they stop, and what they say of it."""

import dataclasses
import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tritonimplicit as ti
from tritonimplicit import Status
from tritonimplicit.fixed_point import Anderson, Broyden, Picard
from tritonimplicit.fixed_point.iterates import Iterates
from tritonimplicit.linear_solve import GMRES

DOUBLE = torch.float64
SOLVERS = {
    "picard": Picard(batch_ndim=1),
    "anderson": Anderson(batch_ndim=1),
    "broyden": Broyden(batch_ndim=1),
    "bad broyden": Broyden(batch_ndim=1, update="bad"),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
accelerated = pytest.mark.parametrize(
    "solver", [s for n, s in SOLVERS.items() if n != "picard"], ids=lambda s: type(s).__name__
)


def with_fields(solver, **fields):
    return dataclasses.replace(solver, **fields)


def contraction(samples=6, n=24, dtype=DOUBLE, seed=0):
    """z -> tanh(a z) / 2 + b, elementwise: bitwise the same alone and in a batch."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.linspace(0.2, 1.8, samples, dtype=DOUBLE)[:, None]
    a = (slopes * torch.rand(samples, n, generator=generator, dtype=DOUBLE)).to(dtype)
    b = torch.randn(samples, n, generator=generator, dtype=DOUBLE).to(dtype)
    return a, b, lambda z, a=a, b=b: 0.5 * torch.tanh(a * z) + b


def norms(t):
    return torch.linalg.vector_norm(t.double().flatten(1), dim=1)


# -- what f may do with its argument -------------------------------------------------------------


@every_solver
def test_the_library_keeps_clones_of_the_iterates(solver):
    _, _, f = contraction()
    cloned, kept = [], Iterates(lambda z: (cloned.append(z.clone()), f(z))[1], range(6))
    solution = with_fields(solver, rtol=1e-12, maxiter=20).solve(kept, torch.zeros(6, 24).double())
    assert len(cloned) > 8  # all of them are written over where they can be
    for k in range(6):
        assert torch.equal(kept.after(k, solution.value), cloned[k])


# -- where they converge ---------------------------------------------------------------------------


@every_solver
def test_a_linear_map_in_closed_form(solver):
    scale = torch.linspace(-0.6, 0.6, 30, dtype=DOUBLE).view(3, 10)
    z = with_fields(solver, rtol=1e-12, maxiter=200)(
        lambda z: scale * z + 1, torch.zeros_like(scale)
    )
    # ‖z - z*‖ <= ‖r‖ / (1 - 0.6)
    torch.testing.assert_close(z, 1 / (1 - scale), rtol=0, atol=1e-12 * norms(z).max().item() / 0.4)


@every_solver
def test_a_nonlinear_map(solver):
    z = with_fields(solver, rtol=1e-13, batch_ndim=0, maxiter=100)(
        torch.cos, torch.ones((), dtype=DOUBLE)
    )
    torch.testing.assert_close(z.item(), 0.739085133215160641655, rtol=0, atol=1e-12)


def test_picards_next_iterate_is_the_image_itself():
    """z + (f(z) - z) would be rounded twice; and an f may have one buffer for all results."""
    buffer = torch.empty(1)
    solution = Picard().solve(lambda z: buffer.fill_(0.1), torch.tensor([1e8]))
    assert solution.iterations == 1 and torch.equal(solution.value, torch.tensor([0.1]))


@accelerated
def test_a_map_on_which_picard_diverges(solver):
    scale = torch.tensor([[-5.0, -3.0, -2.0, 0.5], [3.0, 0.1, -4.0, 2.0]], dtype=DOUBLE)

    def f(z):
        return scale * z + 1

    z0 = torch.zeros_like(scale)
    assert (Picard(batch_ndim=1).solve(f, z0).status == Status.MAX_ITERATIONS).all()
    solution = with_fields(solver, rtol=1e-10).solve(f, z0)
    assert (solution.status == Status.CONVERGED).all()
    # ‖z - z*‖ <= ‖r‖ / min |1 - scale|
    error = norms(solution.value - 1 / (1 - scale))
    assert (error <= 1e-10 * norms(solution.value) / 0.5).all()


@pytest.mark.parametrize("n", [1, 3, 5])
def test_anderson_solves_a_linear_map_of_dimension_m_in_m_plus_1_steps(n):
    generator = torch.Generator().manual_seed(n)
    matrix = torch.randn(4, n, n, generator=generator, dtype=DOUBLE)
    b = torch.randn(4, n, generator=generator, dtype=DOUBLE)

    def f(z):
        return (matrix @ z[..., None])[..., 0] + b

    solution = Anderson(batch_ndim=1, m=5, rtol=1e-9).solve(f, torch.zeros_like(b))
    assert (solution.status == Status.CONVERGED).all()
    assert (solution.iterations <= n + 1).all()


def test_anderson_is_gmres_on_a_linear_map():
    """Step k + 1 is Picard's step from GMRES's x_k (Walker and Ni, theorem 2.2)."""
    generator = torch.Generator().manual_seed(0)
    matrix = 0.4 * torch.randn(12, 12, generator=generator, dtype=DOUBLE)
    b = torch.randn(12, generator=generator, dtype=DOUBLE)

    def f(z):
        return matrix @ z + b

    iterates = []
    Anderson(m=5, maxiter=6, rtol=0.0).solve(lambda z: iterates.append(z.clone()) or f(z), 0 * b)
    for k in range(1, 6):
        x = GMRES(maxiter=k, rtol=0.0)(lambda v: v - matrix @ v, b)
        # The ridge, eps, relative to a Gram matrix whose condition stays below 1e5 here.
        torch.testing.assert_close(iterates[k + 1], f(x), rtol=1e-9, atol=1e-9)


def test_a_full_broyden_memory_begins_again():
    scale = torch.linspace(-2, 0.5, 40, dtype=DOUBLE)
    counts = {}
    for memory in (3, 60):
        solver = Broyden(memory=memory, rtol=1e-8, maxiter=300)
        solution = solver.solve(lambda z: scale * z + 1, torch.zeros_like(scale))
        assert solution.status == Status.CONVERGED
        counts[memory] = int(solution.iterations)
    assert counts[3] > counts[60]


@every_solver
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_scale_over_or_underflows(solver, scale):
    a, b, _ = contraction(dtype=torch.float32)

    def f(z):
        return 0.4 * a * z + scale * b

    solution = with_fields(solver, rtol=1e-5).solve(f, torch.zeros_like(b))
    assert (solution.status == Status.CONVERGED).all()
    unscaled = with_fields(solver, rtol=1e-5).solve(lambda z: 0.4 * a * z + b, torch.zeros_like(b))
    assert (norms(solution.value.double() / scale - unscaled.value) < 1e-4 * norms(b)).all()


# -- samples are independent -----------------------------------------------------------------------


@every_solver
def test_a_sample_is_bitwise_the_same_alone(solver):
    a, b, f = contraction()
    together = solver.solve(f, torch.zeros_like(b))
    assert len(together.iterations.unique()) > 1
    for i in range(len(b)):
        own = functools.partial(f, a=a[i : i + 1], b=b[i : i + 1])
        alone = solver.solve(own, torch.zeros_like(b[:1]))
        assert torch.equal(alone.value[0], together.value[i])
        assert alone.iterations == together.iterations[i]
        assert alone.residual_norm == together.residual_norm[i]


@every_solver
def test_a_sample_that_has_converged_is_frozen(solver):
    factor = torch.tensor([[0.0], [0.9]], dtype=DOUBLE)
    seen = []

    def f(z):
        seen.append(z[0].clone())
        return factor * z.sin() + 1

    solver.solve(f, torch.zeros(2, 8, dtype=DOUBLE))
    assert len(seen) > 4
    assert all(torch.equal(z, seen[1]) for z in seen[2:])


@every_solver
@pytest.mark.parametrize("bad", ["square", "nan", "nan later"])
def test_a_sample_that_diverges_does_not_touch_the_others(solver, bad):
    a, b, f = contraction()
    calls = 0

    def broken(z):
        nonlocal calls
        calls += 1
        out = f(z).clone()
        if bad == "square":
            out[2] = (z[2] + 10).square().exp()
        elif bad == "nan" or calls > 3:
            out[2, 0] = math.nan
        return out

    got = solver.solve(broken, torch.zeros_like(b))
    others = [i for i in range(len(b)) if i != 2]
    expected = solver.solve(lambda z: f(z, a[others], b[others]), torch.zeros_like(b[others]))
    assert torch.equal(got.value[others], expected.value)
    assert torch.equal(got.status[others], expected.status)
    assert torch.equal(got.residual_norm[others], expected.residual_norm)
    if bad == "nan":
        assert got.status[2] == Status.NON_FINITE
        assert got.value[2].isnan().all() and got.residual_norm[2].isnan()
    else:
        assert got.status[2] == Status.DIVERGED
        assert got.value[2].isfinite().all() and got.residual_norm[2].isfinite()


@every_solver
def test_samples_that_depend_on_each_other_are_found_out(solver):
    # The first stops at once, at a fixed point that the second moves away from it.
    def f(z):
        return torch.stack([0.5 * z[0] + z[1], 0.5 * z[1].cos() + 0.2])

    z0 = torch.zeros(2, 3, dtype=DOUBLE)
    solution = solver.solve(f, z0)
    assert solution.status.tolist() == [Status.STAGNATED, Status.CONVERGED]
    residual = norms(f(solution.value) - solution.value)
    torch.testing.assert_close(solution.residual_norm, residual)
    assert residual[0] > 0.1
    with pytest.warns(ti.ConvergenceWarning, match="depend on each other"):
        solver(f, z0)
    whole = with_fields(solver, batch_ndim=0).solve(f, z0)
    assert whole.status == Status.CONVERGED


@every_solver
def test_nan_in_one_start(solver):
    _, b, f = contraction()
    z0 = torch.zeros_like(b)
    z0[1, 3] = math.nan
    solution = solver.solve(f, z0)
    assert solution.status.tolist() == [0, Status.NON_FINITE, 0, 0, 0, 0]
    assert solution.value[1].isnan().all() and solution.value[0].isfinite().all()


# -- when they stop --------------------------------------------------------------------------------


@every_solver
def test_an_exact_start_is_left_alone(solver):
    z0 = torch.full((3, 5), 2.0)
    solution = solver.solve(lambda z: 0.5 * z + 1, z0)
    assert torch.equal(solution.value, z0)
    assert solution.iterations.tolist() == [0, 0, 0]
    assert solution.residual_norm.tolist() == [0, 0, 0]


@every_solver
@pytest.mark.parametrize("maxiter", [0, 1, 2, 7])
def test_f_is_called_once_more_than_maxiter(solver, maxiter):
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return 0.9 * z + 1

    solution = with_fields(solver, maxiter=maxiter, rtol=0.0).solve(f, torch.zeros(2, 3))
    assert calls <= maxiter + 1
    assert (solution.iterations <= maxiter).all()
    if maxiter < 2:
        assert calls == maxiter + 1
        assert (solution.status == Status.MAX_ITERATIONS).all()
        assert torch.equal(solution.value, torch.full((2, 3), float(maxiter)))


@every_solver
def test_the_best_iterate_is_kept(solver):
    scale = torch.tensor([[-3.0, -2.5, 4.0, 2.0, -8.0, 9.0, 0.2, -0.9, 5.5]], dtype=DOUBLE)
    solver = with_fields(solver, maxiter=4)
    norms_seen = []

    def f(z):
        image = scale * z.tanh() + 1 + z
        norms_seen.append(norms(image - z).item())
        return image

    solution = solver.solve(f, torch.ones_like(scale))
    assert solution.status == Status.MAX_ITERATIONS
    torch.testing.assert_close(solution.residual_norm.item(), min(norms_seen), rtol=1e-12, atol=0)
    assert min(norms_seen) < norms_seen[-1]


@every_solver
def test_each_sample_keeps_its_own_best_iterate(solver):
    # Two samples without a fixed point, one that has one: their bests come at different times.
    scale = torch.tensor([[-3.0, 4.0, 9.0], [0.5, -0.9, 0.2], [5.5, -8.0, 2.5]], dtype=DOUBLE)
    expands = torch.tensor([[True], [False], [True]])
    solver = with_fields(solver, maxiter=6, rtol=1e-12)
    seen, residuals = [], []

    def f(z):
        image = torch.where(expands, scale * z.tanh() + 1 + z, 0.9 * (scale * z).sin() + 1)
        seen.append(z.clone())
        residuals.append(norms(image - z))
        return image

    solution = solver.solve(f, torch.ones_like(scale))
    residuals = torch.stack(residuals)
    best = residuals.argmin(0)
    assert len(best.unique()) > 1
    for i, k in enumerate(best.tolist()):
        assert torch.equal(solution.value[i], seen[k][i])
        torch.testing.assert_close(solution.residual_norm[i], residuals[k, i])


@every_solver
@pytest.mark.parametrize("check_every", [1, 3, 50])
def test_polls_change_nothing(solver, check_every):
    _, b, f = contraction()
    expected = solver.solve(f, torch.zeros_like(b))
    got = with_fields(solver, check_every=check_every).solve(f, torch.zeros_like(b))
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.iterations, expected.iterations)


class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@every_solver
def test_a_blind_solve_reads_nothing(solver):
    _, b, f = contraction()
    blind = with_fields(solver, check_every=0, on_failure="ignore")
    with Reads() as reads:
        z = blind(f, torch.zeros_like(b))
    assert reads.count == 0
    assert torch.equal(z, solver(f, torch.zeros_like(b)))


@every_solver
@pytest.mark.parametrize("check_every", [None, 1, 3, 7])
def test_the_host_reads_the_polls_alone(solver, check_every):
    _, b, f = contraction()
    solver = with_fields(solver, check_every=check_every)
    with Reads() as reads:
        solution = solver.solve(f, torch.zeros_like(b))
    iterations = int(solution.iterations.max())
    assert reads.count <= -(-iterations // (check_every or 1)) + 1


@pytest.mark.gpu
@every_solver
def test_a_blind_solve_never_synchronises(solver):
    a, b, _ = contraction()
    a, b = a.cuda(), b.cuda()
    blind = with_fields(solver, check_every=0, on_failure="ignore")

    def f(z):
        return 0.5 * torch.tanh(a * z) + b

    blind(f, torch.zeros_like(b))  # loads the libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        z = blind(f, torch.zeros_like(b))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(z, with_fields(solver)(f, torch.zeros_like(b)))


@pytest.mark.gpu
@every_solver
def test_polls_on_a_gpu_do_not_wait_for_the_device(solver):
    a, b, _ = contraction()
    a, b = a.cuda(), b.cuda()
    polled = with_fields(solver, check_every=2, on_failure="ignore")

    def f(z):
        return 0.5 * torch.tanh(a * z) + b

    expected = polled(f, torch.zeros_like(b))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        z = polled(f, torch.zeros_like(b))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(z, expected)


# -- structures and precisions ---------------------------------------------------------------------


@every_solver
def test_pytrees(solver):
    z0 = {"fine": torch.zeros(2, 3, 4, dtype=DOUBLE), "coarse": (torch.zeros(2, 5, dtype=DOUBLE),)}

    def f(z):
        fine, coarse = z["fine"], z["coarse"][0]
        return {
            "fine": 0.3 * fine.cos() + coarse.mean(1)[:, None, None] / 4,
            "coarse": (0.2 * coarse.sin() + fine.sum((1, 2))[:, None] / 48 + 1,),
        }

    solution = with_fields(solver, rtol=1e-10).solve(f, z0)
    assert (solution.status == Status.CONVERGED).all()
    image = f(solution.value)
    square = norms(image["fine"] - solution.value["fine"]).square()
    square += norms(image["coarse"][0] - solution.value["coarse"][0]).square()
    torch.testing.assert_close(square.sqrt(), solution.residual_norm, rtol=1e-10, atol=0)


@every_solver
def test_a_batch_of_two_dimensions(solver):
    a, b, f = contraction()
    flat = solver.solve(f, torch.zeros_like(b))
    a, b = a.view(2, 3, 24), b.view(2, 3, 24)
    got = with_fields(solver, batch_ndim=2).solve(lambda z: f(z, a, b), torch.zeros_like(b))
    assert got.status.shape == (2, 3)
    assert torch.equal(got.value.view(6, 24), flat.value)


@every_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(solver, dtype):
    _, b, f = contraction(dtype=dtype)
    seen = set()

    def watched(z):
        seen.add(z.dtype)
        return f(z)

    solution = solver.solve(watched, torch.zeros_like(b))
    assert seen == {dtype} and solution.value.dtype is dtype
    assert (solution.status == Status.CONVERGED).all()
    # The residual is that of the value as it is returned, rounded.
    image = f(solution.value)
    residual = norms(image.double() - solution.value.double())
    torch.testing.assert_close(solution.residual_norm, residual, rtol=1e-6, atol=0)
    assert (residual <= max(1e-3, torch.finfo(dtype).eps) * norms(image) * (1 + 1e-6)).all()


def test_under_autocast_the_solvers_own_products_are_not_rounded():
    scale = torch.linspace(-0.8, 0.8, 20).view(2, 10)

    def f(z):
        return scale * z + 1

    expected = Anderson(batch_ndim=1).solve(f, torch.zeros_like(scale))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = Anderson(batch_ndim=1).solve(f, torch.zeros_like(scale))
    assert torch.equal(got.value, expected.value)


# -- the contract ----------------------------------------------------------------------------------


@every_solver
def test_failures_are_reported(solver):
    f, z0 = (lambda z: z + 1), torch.zeros(2, 3)
    with pytest.warns(
        ti.ConvergenceWarning, match=r"some of 2 systems did not converge.*solve\(f, z0\)"
    ):
        solver(f, z0)
    with pytest.raises(ti.ConvergenceError, match="2 of 2 systems did not converge") as caught:
        solver(f, z0, on_failure="raise")
    assert caught.value.solution.value.shape == (2, 3)
    solver(f, z0, on_failure="ignore")
    solver(f, z0, rtol=0.0)  # no tolerance was asked for
    with pytest.warns(ti.ConvergenceWarning, match="diverged to NaN or infinity"):
        solver(lambda z: (z + 9).square().exp(), z0)
    with pytest.warns(ti.ConvergenceWarning, match="met NaN or infinity in z0"):
        solver(lambda z: z * math.nan, z0)


def test_what_is_recorded_in_a_log():
    with ti.record_solves() as log:
        solution = Anderson().solve(torch.cos, torch.ones(3))
    assert log[0].status is solution.status and solution.solver == "Anderson"
    assert torch.equal(log[0].value, solution.value)
    assert len(solution.history) == int(solution.iterations) + 1
    torch.testing.assert_close(solution.history[-1], solution.residual_norm)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Anderson(m=0), ValueError, "m must be at least 1"),
        (lambda: Anderson(beta=0), ValueError, "beta must not be zero"),
        (lambda: Anderson(beta=math.nan), ValueError, "beta must be finite"),
        (lambda: Broyden(memory=0), ValueError, "memory must be at least 1"),
        (lambda: Broyden(update="ugly"), ValueError, "update must be one of 'good', 'bad'"),
        (lambda: Picard(rtol=-1), ValueError, "rtol must not be negative"),
        (lambda: Picard(maxiter=2.0), TypeError, "maxiter must be an int"),
        (lambda: Picard(maxiter=None), TypeError, "maxiter must be an int"),
        (lambda: Picard(maxiter=2**31), ValueError, "maxiter must be at most 2147483647"),
        (lambda: Picard(m=5), TypeError, "m"),
        (lambda: Picard()(torch.cos, torch.ones(2), m=5), TypeError, "Picard has no field m"),
        (lambda: Picard()(3, torch.ones(2)), TypeError, "f must be a function"),
        (lambda: Picard()(torch.cos, torch.ones(2, dtype=torch.int64)), TypeError, "z0 has dtype"),
        (lambda: Picard()(lambda z: z[:1], torch.ones(2)), ValueError, "f has a leaf of shape"),
        (lambda: Picard()(lambda z: (z,), torch.ones(2)), TypeError, "structure of z0"),
        (lambda: Picard()(lambda z: z.double(), torch.ones(2)), TypeError, "where z0 has"),
        (lambda: Picard()(lambda z: z.mul_(0.5), torch.ones(2)), RuntimeError, "f changed its"),
    ],
)
def test_misuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_transforms_are_refused(transform):
    with pytest.raises(RuntimeError, match="custom_fixed_point"):
        transform(lambda z: Picard()(torch.cos, z).sum())(torch.ones(3))
    with pytest.raises(RuntimeError, match="custom_fixed_point"):
        transform(lambda a: Picard()(lambda z: a.sum() * z.cos(), torch.ones(3)).sum())(
            torch.ones(3)
        )


def test_inside_custom_fixed_point_it_is_differentiable():
    def f(z, a):
        return 0.5 * torch.tanh(a * z) + 1

    solver = Anderson(rtol=1e-13, batch_ndim=1)
    equilibrium = ti.custom_fixed_point(f, argnums=1, solve=GMRES(rtol=1e-13, batch_ndim=1))(
        lambda z0, a: solver(lambda z: f(z, a), z0)
    )
    a = torch.rand(2, 3, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: equilibrium(torch.zeros_like(a), a), a)


@every_solver
def test_what_is_too_small_to_be_judged_is_no_success(solver):
    """Squares below 1e-308 are zero in float64: any residual would seem to be within tolerance."""

    def f(z):
        return 0.5 * z + 1e-200

    start = torch.zeros(2, 3, dtype=DOUBLE)
    solution = with_fields(solver, maxiter=3).solve(f, start)
    assert (solution.status == Status.BREAKDOWN).all()
    exact = with_fields(solver, maxiter=3).solve(lambda z: z + 0.0 * start, start)
    assert (exact.status == Status.CONVERGED).all()
    small = with_fields(solver, atol=1e-100, maxiter=3).solve(f, start)
    assert (small.status == Status.CONVERGED).all()
