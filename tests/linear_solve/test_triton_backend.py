"""The solvers over the Triton kernels: in the interpreter, and on a GPU where there is one."""

import dataclasses

import pytest
import torch

import tritonimplicit as ti
from tritonimplicit.linear_solve import CG, GMRES, BiCGSTAB, Jacobi, Neumann, NormalCG

SOLVERS = [
    CG(rtol=1e-6, maxiter=60, batch_ndim=1),
    CG(rtol=1e-6, maxiter=60, batch_ndim=1, M=Jacobi(2)),
    NormalCG(rtol=1e-6, maxiter=200, batch_ndim=1),
    NormalCG(rtol=1e-6, maxiter=200, batch_ndim=1, M=Jacobi(2)),
    Neumann(rtol=1e-6, maxiter=200, batch_ndim=1),
    GMRES(rtol=1e-6, maxiter=60, batch_ndim=1, restart=5),
    BiCGSTAB(rtol=1e-6, maxiter=60, batch_ndim=1),
    BiCGSTAB(rtol=1e-6, maxiter=60, batch_ndim=1, M=Jacobi(2)),
]


@pytest.mark.parametrize(
    "solver",
    SOLVERS,
    ids=[
        "cg",
        "cg-jacobi",
        "normal_cg",
        "normal_cg-jacobi",
        "neumann",
        "gmres",
        "bicgstab",
        "bicgstab-jacobi",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batched_pytree_is_solved_as_by_the_reference(solver, dtype, device):
    torch.manual_seed(0)
    scale = {"a": torch.rand(3, 37, dtype=dtype) + 0.5, "b": torch.rand(3, 2, 5, dtype=dtype) + 0.5}
    b = {"a": torch.randn(3, 37, dtype=dtype), "b": torch.randn(3, 2, 5, dtype=dtype)}
    b["a"][1] = torch.nan  # and its neighbours go on

    def matvec(on):
        return lambda v: {name: v[name] * scale[name].to(on) for name in v}

    expected = dataclasses.replace(solver, backend="reference").solve(matvec("cpu"), b)
    moved = {name: leaf.to(device) for name, leaf in b.items()}
    got = dataclasses.replace(solver, backend="triton").solve(matvec(device), moved)
    converged, broken = ti.Status.CONVERGED, ti.Status.NON_FINITE
    assert got.status.tolist() == expected.status.tolist() == [converged, broken, converged]
    # The sums of dot products run in another order: rounding may move the stop by an iteration.
    assert (got.iterations.cpu() - expected.iterations).abs().max() <= 1
    for name in b:
        assert got.value[name][1].isnan().all()
        for row in (0, 2):
            # Both residuals are at most rtol; cond A <= 3 (its square in the normal equations).
            error = (got.value[name][row].cpu() - expected.value[name][row]).norm()
            assert error <= 9 * 2e-6 * b[name][[0, 2]].norm()


@pytest.mark.parametrize("check_every", [None, 1, 4, 0])
def test_the_poll_only_decides_when_the_host_stops(check_every, device):
    torch.manual_seed(0)
    scale = (torch.rand(4, 50, dtype=torch.float64) + 0.2).to(device)
    b = torch.randn(4, 50, dtype=torch.float64).to(device)
    solver = CG(rtol=1e-8, maxiter=40, batch_ndim=1, backend="triton")
    expected = solver.solve(lambda v: scale * v, b)
    got = dataclasses.replace(solver, check_every=check_every).solve(lambda v: scale * v, b)
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.iterations, expected.iterations)
    assert (got.status == ti.Status.CONVERGED).all()


def test_the_gradient_through_a_root(device):
    torch.manual_seed(0)
    scale = (torch.rand(3, 20, dtype=torch.float64) + 0.5).to(device)
    x = torch.randn(3, 20, dtype=torch.float64).to(device).requires_grad_()
    solve = CG(rtol=1e-10, batch_ndim=1, backend="triton")
    solver = ti.custom_root(lambda z, x: scale * z - x, argnums=1, solve=solve)(
        lambda _, x: x / scale
    )
    (got,) = torch.autograd.grad(solver(None, x).sum(), x)
    torch.testing.assert_close(got, 1 / scale)


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu_and_the_reference_agrees_there():
    torch.manual_seed(0)
    scale, b = torch.rand(2, 100).cuda() + 0.5, torch.randn(2, 100).cuda()
    results = [
        CG(rtol=1e-6, batch_ndim=1, backend=backend)(lambda v: scale * v, b)
        for backend in ("auto", "triton", "reference")
    ]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-5)
