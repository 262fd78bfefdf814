"""The host reads the device as often as `check_every` says, and no matvec is wasted."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritonimplicit.linear_solve import (
    CG,
    GMRES,
    MINRES,
    BiCGSTAB,
    FusedSolver,
    Jacobi,
    Neumann,
    NormalCG,
)

DOUBLE = torch.float64
SOLVERS = {
    "cg": CG(rtol=1e-8),
    "normal_cg": NormalCG(rtol=1e-8),
    "neumann": Neumann(rtol=1e-8, maxiter=400),
    "gmres": GMRES(rtol=1e-8),
    "bicgstab": BiCGSTAB(rtol=1e-8),
    "minres": MINRES(rtol=1e-8),
}
JACOBI = CG(rtol=1e-8, M=Jacobi())
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
FUSED = {name: solver for name, solver in SOLVERS.items() if isinstance(solver, FusedSolver)}
every_fused_solver = pytest.mark.parametrize("solver", FUSED.values(), ids=FUSED)


class Reads(TorchDispatchMode):
    """Counts the values that leave tensors one at a time: what `.item()` and `bool()` come to."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def problem(device="cpu"):
    scale = torch.linspace(0.5, 1.5, 40, dtype=DOUBLE, device=device)
    b = torch.randn(4, 40, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).to(device)
    return (lambda v: scale * v), b


@every_solver
@pytest.mark.parametrize("check_every", [1, 3, 5, 50])
def test_reads_of_a_solve_that_converges(solver, check_every):
    solver = dataclasses.replace(solver, batch_ndim=1, check_every=check_every)
    matvec, b = problem()
    iterations = int(solver.solve(matvec, b).iterations.max())
    with Reads() as reads:
        solver(matvec, b)
    assert 5 < iterations < 50
    assert reads.count <= math.ceil(iterations / check_every) + 2


@every_solver
@pytest.mark.parametrize("check_every", [1, 4, 7])
def test_reads_of_a_solve_that_its_limit_ends(solver, check_every):
    solver = dataclasses.replace(solver, batch_ndim=1, check_every=check_every, maxiter=8, rtol=0.0)
    with Reads() as reads:
        solver(*problem())
    assert reads.count <= math.ceil(8 / check_every) + 2


@pytest.mark.parametrize("solver", [*SOLVERS.values(), JACOBI], ids=[*SOLVERS, "cg with jacobi"])
def test_a_blind_solve_reads_nothing(solver):
    blind = dataclasses.replace(solver, batch_ndim=1, check_every=0, on_failure="ignore")
    matvec, b = problem()
    with Reads() as reads:
        x = blind(matvec, b)
    assert reads.count == 0
    assert torch.equal(x, dataclasses.replace(solver, batch_ndim=1)(matvec, b))


def test_reads_are_seen():
    with Reads() as reads:
        bool(torch.ones(()))
    assert reads.count == 1


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_solver
def test_a_blind_solve_never_synchronises(solver):
    blind = dataclasses.replace(solver, batch_ndim=1, check_every=0, on_failure="ignore")
    matvec, b = problem("cuda")
    blind(matvec, b)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = blind(matvec, b)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(x, dataclasses.replace(solver, batch_ndim=1)(matvec, b))


@pytest.mark.gpu
@every_solver
def test_iterations_after_the_late_poll_change_nothing(solver):
    matvec, b = problem("cuda")
    results = [
        dataclasses.replace(solver, batch_ndim=1, check_every=every).solve(matvec, b)
        for every in (1, 2, 16)
    ]
    for other in results[1:]:
        assert torch.equal(results[0].value, other.value)
        assert torch.equal(results[0].iterations, other.iterations)


@pytest.mark.gpu
@pytest.mark.parametrize("check_every", [None, 2, 6])
@every_fused_solver
def test_a_graph_gives_what_launches_one_by_one_give(solver, check_every):
    matvec, b = problem("cuda")
    plain = dataclasses.replace(solver, batch_ndim=1)
    graphed = dataclasses.replace(plain, cuda_graph=True, check_every=check_every)
    expected, got = plain.solve(matvec, b), graphed.solve(matvec, b)
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.iterations, expected.iterations)
    assert torch.equal(got.status, expected.status)


@pytest.mark.gpu
@every_fused_solver
def test_a_backward_pass_in_a_graph(solver):
    import tritonimplicit as ti

    scale = torch.linspace(1, 2, 64, device="cuda")
    grads = []
    for cuda_graph in (False, True):
        solve = dataclasses.replace(solver, rtol=1e-5, cuda_graph=cuda_graph)
        root = ti.custom_root(lambda x, a: scale * x + 0.1 * x**3 - a, argnums=1, solve=solve)

        @root
        def newton(x, a):
            for _ in range(20):
                x = x - (scale * x + 0.1 * x**3 - a) / (scale + 0.3 * x**2)
            return x

        a = torch.ones(64, device="cuda", requires_grad=True)
        newton(torch.zeros(64, device="cuda"), a).square().sum().backward()
        grads.append(a.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
def test_a_matvec_that_cannot_be_captured_warns_and_is_solved_all_the_same():
    scale = torch.linspace(0.5, 1.5, 40, device="cuda")

    def matvec(v):
        assert v.sum().item() == v.sum().item()  # a synchronisation, which no graph can hold
        return scale * v

    b = torch.ones(40, device="cuda")
    solver = CG(cuda_graph=True, check_every=2)
    with pytest.warns(UserWarning, match="no graph could be captured"):
        x = solver(matvec, b)
    torch.testing.assert_close(x, b / scale, rtol=1e-4, atol=1e-4)


def test_without_a_gpu_a_graph_warns_and_is_solved_all_the_same():
    matvec, b = problem()
    solver = CG(cuda_graph=True, check_every=2, batch_ndim=1, rtol=1e-8)
    with pytest.warns(UserWarning, match="no graph could be captured"):
        x = solver(matvec, b)
    assert torch.equal(x, CG(batch_ndim=1, rtol=1e-8)(matvec, b))
