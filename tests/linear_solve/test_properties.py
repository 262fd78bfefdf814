"""Whatever the problem: a result meets its tolerance, judged in fp64, or its status says not."""

import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonimplicit import Status
from tritonimplicit.linear_solve import CG, GMRES, MINRES, BiCGSTAB, Dense, Neumann, NormalCG


@st.composite
def problems(draw):
    """(matrix (B, n, n), b (B, n), dtype), of every kind that solvers fail on."""
    seed, n = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 12))
    batch = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["spd", "negative", "indefinite", "general", "singular", "skew"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale_a, scale_b = (
        draw(st.sampled_from([1e-12, 1.0, 1e12])),
        draw(st.sampled_from([1e-30, 1.0, 1e30])),
    )
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q = torch.linalg.qr(randn(batch, n, n))[0]
    eigenvalues = 10.0 ** -torch.linspace(0, draw(st.integers(0, 6)), n, dtype=torch.float64)
    if kind == "negative":
        eigenvalues = -eigenvalues
    if kind == "indefinite":
        eigenvalues[::2] *= -1
    if kind == "singular":
        eigenvalues[-1] = 0
    matrix = (q * eigenvalues) @ q.mT
    if kind == "general":
        matrix = randn(batch, n, n)
    if kind == "skew":
        matrix = matrix.triu(1) - matrix.triu(1).mT
    b = randn(batch, n) * draw(st.sampled_from([0.0, 1.0, 1.0, 1.0]))
    poison = draw(st.sampled_from([None, None, None, torch.nan, torch.inf]))
    matrix, b = (matrix * scale_a).to(dtype), (b * scale_b).to(dtype)
    if poison is not None:
        (matrix if draw(st.booleans()) else b).view(-1)[0] = poison
    return matrix, b


solvers = st.one_of(
    st.builds(
        lambda cls, rtol, atol, maxiter: cls(rtol=rtol, atol=atol, maxiter=maxiter, batch_ndim=1),
        st.sampled_from([CG, NormalCG, Neumann, GMRES, BiCGSTAB, MINRES]),
        st.sampled_from([0.0, 1e-3, 1e-6, 1e-12]),
        st.sampled_from([0.0, 0.0, 1e-3]),
        st.sampled_from([0, 1, 5, 40, None]),
    ),
    st.just(Dense(batch_ndim=1)),
)


def asked(solver, norm, eps):
    """The residual norm that CONVERGED promises for a right hand side of this norm."""
    if isinstance(solver, Dense):
        return eps**0.5 * norm
    return max(max(solver.rtol, eps) * norm, solver.atol)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(problem=problems(), solver=solvers)
def test_never_silently_wrong(problem, solver):
    matrix, b = problem
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # `solve` reports, and never warns
        solution = solver.solve(lambda v: (matrix @ v[..., None])[..., 0], b)
    eps, exact = torch.finfo(b.dtype).eps, matrix.double()
    for i, status in enumerate(solution.status.tolist()):
        x = solution.value[i].double()
        if not (exact[i].isfinite().all() and b[i].isfinite().all()):
            # A Krylov method that may do no iteration looks at b alone.
            unseen = isinstance(solver, (CG, GMRES, BiCGSTAB, MINRES)) and solver.maxiter == 0
            at_start = status == Status.MAX_ITERATIONS and b[i].isfinite().all()
            assert status == Status.NON_FINITE or (unseen and at_start)
        if status == Status.NON_FINITE:
            assert x.isnan().all()
        if status != Status.CONVERGED:
            continue
        residual, rhs = b[i].double() - exact[i] @ x, b[i].double()
        # The solver judges by products in its own precision: they round by n eps |A| |x|.
        rounding = 4 * len(x) * eps * (exact[i].abs() @ x.abs() + rhs.abs())
        if isinstance(solver, NormalCG):
            residual, rhs = exact[i].mT @ residual, exact[i].mT @ rhs
            rounding = exact[i].abs().mT @ rounding * 2
        assert residual.norm() <= asked(solver, rhs.norm(), eps) * (1 + 1e-3) + rounding.norm()
