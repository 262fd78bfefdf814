"""Whatever the problem: a result meets its tolerance, judged in fp64, or its status says not."""

import dataclasses
import warnings
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonimplicit import Status
from tritonimplicit.linear_solve import (
    CG,
    GMRES,
    MINRES,
    Auto,
    BiCGSTAB,
    Dense,
    Jacobi,
    Neumann,
    NormalCG,
    Nystrom,
)

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """Systems A x = b: A (B, n, n), b (B, n), an initial guess (B, n) or None, leaves of b."""

    matrix: Tensor
    b: Tensor
    init: Tensor | None
    split: int

    def tree(self, rows):
        """(B, n) as one leaf, or as a dict of two."""
        if not self.split:
            return rows
        return {"head": rows[:, : self.split], "tail": [rows[:, self.split :]]}

    def rows(self, tree):
        return torch.cat([tree["head"], *tree["tail"]], 1) if self.split else tree

    def matvec(self, v):
        return self.tree((self.matrix @ self.rows(v)[..., None])[..., 0])


@st.composite
def problems(draw):
    """Problems of every kind that solvers fail on."""
    seed, n = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 12))
    batch = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["spd", "negative", "indefinite", "general", "singular", "skew"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, *HALVES]))
    scale_a, scale_b = (
        draw(st.sampled_from([1e-12, 1.0, 1e12])),
        draw(st.sampled_from([1e-30, 1.0, 1e30])),
    )
    if dtype is torch.float16:  # whose numbers end at 6e-8 and 65,504
        scale_a = scale_b = 1.0
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
    matrix, b = (matrix * scale_a).to(dtype), (b * scale_b).to(dtype)
    guess = draw(st.sampled_from(["none", "none", "random", "exact"]))
    init = None if guess == "none" else (randn(batch, n) * scale_b).to(dtype)
    if guess == "exact":
        b = (matrix @ init[..., None])[..., 0]
    poison = draw(st.sampled_from([None, None, None, torch.nan, torch.inf]))
    if poison is not None:
        (matrix if draw(st.booleans()) else b).view(-1)[0] = poison
    return Problem(matrix, b, init, draw(st.integers(0, n - 1)))


iterative = st.builds(
    lambda cls, rtol, atol, maxiter, M: cls(
        rtol=rtol, atol=atol, maxiter=maxiter, M=M, batch_ndim=1
    ),
    st.sampled_from([CG, NormalCG, Neumann, GMRES, BiCGSTAB, MINRES, Auto]),
    st.sampled_from([0.0, 1e-3, 1e-6, 1e-12]),
    st.sampled_from([0.0, 0.0, 1e-3]),
    st.sampled_from([0, 1, 5, 40, None]),
    st.sampled_from([None, None, None, Jacobi(), Nystrom(3)]),
)
dense = st.builds(
    lambda definite, rtol: Dense(positive_definite=definite, rtol=rtol, batch_ndim=1),
    st.booleans(),
    st.sampled_from([None, 1e-6, 0.0]),
)


def asked(solver, norm, eps):
    """The residual norm that CONVERGED promises for a right hand side of this norm."""
    if isinstance(solver, Dense):
        return (eps**0.5 if solver.rtol is None else max(solver.rtol, eps)) * norm
    return max(max(solver.rtol, eps) * norm, solver.atol)


def sees_the_matrix(solver):
    """Whether the solver is bound to look at more than b; one of no iterations may not."""
    thorough = isinstance(solver, (Dense, Neumann, Auto))  # Auto is dense for so few unknowns
    return thorough or solver.maxiter != 0 or solver.init is not None


@settings(max_examples=2500, deadline=None, derandomize=True)
@given(problem=problems(), solver=st.one_of(iterative, iterative, iterative, dense))
def test_never_silently_wrong(problem, solver):
    matrix, b = problem.matrix, problem.b
    if problem.init is not None and not isinstance(solver, Dense):
        solver = dataclasses.replace(solver, init=problem.tree(problem.init))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # `solve` reports, and never warns
        solution = solver.solve(problem.matvec, problem.tree(b))
    value = problem.rows(solution.value)
    state = torch.float64 if b.dtype is torch.float64 else torch.float32
    eps, unit, exact = torch.finfo(state).eps, torch.finfo(b.dtype).eps, matrix.double()
    for i, status in enumerate(solution.status.tolist()):
        x = value[i].double()
        if not b[i].isfinite().all():
            assert status == Status.NON_FINITE
        elif not exact[i].isfinite().all():
            at_start = status == Status.MAX_ITERATIONS and not sees_the_matrix(solver)
            assert status == Status.NON_FINITE or at_start
        if status == Status.NON_FINITE:
            assert x.isnan().all()
        if status != Status.CONVERGED:
            continue
        residual, rhs = b[i].double() - exact[i] @ x, b[i].double()
        # The solver judges by products in b's own precision: they round by n eps |A| |x|. Below
        # the smallest normal number it may be all, of x as of products.
        tiny = torch.finfo(b.dtype).tiny
        rounding = 4 * len(x) * unit * (exact[i].abs() @ x.abs() + rhs.abs())
        rounding += (exact[i].abs().sum(1) + len(x)) * tiny  # of x, and of products
        if isinstance(solver, NormalCG):
            residual, rhs = exact[i].mT @ residual, exact[i].mT @ rhs
            rounding = exact[i].abs().mT @ rounding * 2 + len(x) * tiny
        assert residual.norm() <= asked(solver, rhs.norm(), eps) * (1 + 1e-3) + rounding.norm()
