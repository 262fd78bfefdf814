"""A batch of 100 systems, from easy to hopeless: each is solved, stopped and judged by itself."""

import dataclasses

import pytest
import torch

from tritonimplicit import Status
from tritonimplicit.linear_solve import CG, GMRES, MINRES, BiCGSTAB, Neumann, NormalCG

DOUBLE = torch.float64
B, N = 100, 32
CONDITIONS = torch.logspace(0, 6, B, dtype=DOUBLE)
EIGENVALUES = CONDITIONS[:, None] ** -torch.linspace(0, 1, N, dtype=DOUBLE)  # (B, N)
SOLVERS = {
    "cg": CG(rtol=1e-6),
    "normal_cg": NormalCG(rtol=1e-6),
    "neumann": Neumann(rtol=1e-6, maxiter=300),
    "gmres": GMRES(rtol=1e-6),
    "bicgstab": BiCGSTAB(rtol=1e-6),
    "minres": MINRES(rtol=1e-6),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def batched(solver, **fields):
    return dataclasses.replace(solver, batch_ndim=1, **fields)


def right_hand_sides(dtype):
    return torch.randn(B, N, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).to(dtype)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_diagonal_batch_is_its_systems_alone_bit_for_bit(solver, dtype):
    scale, b = EIGENVALUES.to(dtype), right_hand_sides(dtype)
    solver = dataclasses.replace(solver, maxiter=100)
    together = batched(solver).solve(lambda v: scale * v, b)
    for i in range(B):
        alone = solver.solve(lambda v, i=i: scale[i] * v, b[i])
        assert torch.equal(alone.value, together.value[i])
        assert alone.iterations == together.iterations[i]
        assert alone.status == together.status[i]
    assert together.status[0] == Status.CONVERGED and len(together.iterations.unique()) > 5


@every_solver
def test_each_system_is_told_the_truth(solver):
    scale, b = EIGENVALUES.float(), right_hand_sides(torch.float32)
    solution = batched(solver, maxiter=100).solve(lambda v: scale * v, b)
    exact, x, rhs = scale.double(), solution.value.double(), b.double()
    residual = rhs - exact * x
    if isinstance(solver, NormalCG):
        residual, rhs = exact * residual, exact * rhs
    residual, size = residual.norm(dim=1), rhs.norm(dim=1)
    converged = solution.status == Status.CONVERGED
    # Products round by eps, once or twice, and so do sums.
    rounding = 4 * torch.finfo(torch.float32).eps * ((exact * x).norm(dim=1) + rhs.norm(dim=1))
    assert (residual[converged] <= 1e-6 * size[converged] + rounding[converged]).all()
    hard = ~converged
    assert hard.any() and converged.any()
    assert set(solution.status[hard].tolist()) <= {Status.MAX_ITERATIONS, Status.STAGNATED}
    # The reported norm of an unconverged system is its residual, which drifts by rounding at most.
    torch.testing.assert_close(solution.residual_norm[hard], residual[hard], rtol=0.1, atol=1e-5)


@every_solver
def test_a_converged_system_is_frozen(solver):
    """Whatever its neighbours still do: its bits are those of a batch that stops when it does."""
    scale, b = EIGENVALUES.float(), right_hand_sides(torch.float32)
    full = batched(solver, maxiter=200).solve(lambda v: scale * v, b)
    easy = int((full.iterations <= 20).sum())
    assert 3 < easy < B
    stopped = batched(solver, maxiter=200).solve(lambda v: scale[:easy] * v, b[:easy])
    assert torch.equal(stopped.value, full.value[:easy])


@pytest.mark.parametrize("name", ["cg", "normal_cg", "gmres", "minres"])
def test_counts_of_full_matrices_are_close_to_those_alone(name):
    """bmm and mv round differently, which ill-conditioned systems amplify from step to step.

    So the counts of the hardest may differ by more than a tenth: of 800 systems of this kind, in
    fp64 by CG, two differed by 12 and 13 %. GMRES without restarts, which amplify it further.
    """
    solver = batched(SOLVERS[name], maxiter=2000)
    if name == "gmres":
        solver = dataclasses.replace(solver, restart=N)
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(B, N, N, dtype=DOUBLE, generator=generator))[0]
    eigenvalues = EIGENVALUES.sqrt() if name == "normal_cg" else EIGENVALUES
    matrix = (q * eigenvalues[:, None, :]) @ q.mT
    b = right_hand_sides(DOUBLE)
    together = solver.solve(lambda v: torch.bmm(matrix, v[:, :, None])[:, :, 0], b)
    alone = [
        solver.solve(lambda v, i=i: v @ matrix[i].mT, b[i : i + 1]).iterations for i in range(B)
    ]
    expected, got = torch.cat(alone).double(), together.iterations.double()
    difference = (got - expected).abs()
    assert (difference > (0.1 * expected).clamp(min=2)).sum() <= 2
    assert (difference <= (0.2 * expected).clamp(min=2)).all()
