"""CG with a diagonal preconditioner, fused: the textbook's iterations, restarts, its buffers."""

import dataclasses

import pytest
import torch

import tritonimplicit as ti
import tritonimplicit_kernels as kernels
from tests.linear_solve.test_preconditioners import DOUBLE, bmv, spd
from tritonimplicit.linear_solve import CG, Jacobi
from tritonimplicit.linear_solve.preconditioned_cg import DiagonalCG
from tritonimplicit.linear_solve.preconditioners import row_preconditioner
from tritonimplicit.linear_solve.rows import RowMatvec
from tritonimplicit.vectors import Layout

Status = ti.Status


def jacobi_as_a_function(solver, matvec, b):
    """The same solver with the same diagonal, which it does not know to be one."""
    layout = Layout.of(b, solver.batch_ndim)
    inverse = row_preconditioner(solver.M, RowMatvec(matvec, layout)).inverse[:, : b.shape[-1]]
    return dataclasses.replace(solver, M=lambda r: r * inverse.reshape(b.shape))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (DOUBLE, 1e-9)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n", [40, 300])
def test_the_fused_form_takes_the_textbooks_iterations(n, sign, dtype, rtol):
    torch.manual_seed(0)
    spread = 10 ** torch.rand(3, n, dtype=DOUBLE)
    matrix = sign * spread[:, :, None] * spd(n, torch.linspace(0.1, 1, n, dtype=DOUBLE), (3,))
    matrix = (matrix * spread[:, None, :]).to(dtype)
    b = torch.randn(3, n, dtype=dtype)
    fused = CG(rtol=rtol, batch_ndim=1, M=Jacobi())
    textbook = jacobi_as_a_function(fused, bmv(matrix), b)
    got, expected = (solver.solve(bmv(matrix), b) for solver in (fused, textbook))
    assert got.status.tolist() == expected.status.tolist() == [Status.CONVERGED] * 3
    assert (got.iterations > 8).all()
    assert ((got.iterations - expected.iterations).abs() <= 1).all()


def diagonal_cg(**fields):
    """Two systems, and a diagonal M that is not their inverse."""
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(2, 48, dtype=DOUBLE, generator=generator)
    scale = torch.logspace(0, 2, 48, dtype=DOUBLE)
    apply = RowMatvec(lambda v: scale * v, Layout.of(b, 1))
    M = Jacobi(2).on_rows(RowMatvec(lambda v: v * (scale + scale.flip(0)), apply.layout))
    return DiagonalCG(CG(batch_ndim=1, **fields), apply, b, M)


def run(recurrence, steps):
    for _ in range(steps):
        recurrence.step()
        recurrence.progress.swap()


@pytest.mark.parametrize("steps", [2, 3])  # sums of r.z have two places
def test_a_restart_is_a_new_start_for_its_systems_alone(steps):
    restarted, undisturbed = diagonal_cg(), diagonal_cg()
    run(restarted, steps)
    new = diagonal_cg(init=restarted.x.clone())
    residual = new.apply.residual(restarted.x, new.b)
    again = torch.arange(len(residual)) == 1
    restarted.restart(again, residual)
    restarted.progress.restart(again, kernels.row_norms(residual))
    run(restarted, 3)
    run(new, 3)
    run(undisturbed, steps + 3)
    assert (restarted.progress.state[0] < 0).all()
    assert torch.equal(restarted.x[1], new.x[1])
    assert torch.equal(restarted.x[0], undisturbed.x[0])


def test_buffers_that_a_failed_graph_puts_back_are_followed():
    one, other = diagonal_cg(), diagonal_cg()
    for _ in range(5):
        run(one, 1)
        run(other, 1)
        buffers = dict(vars(other.progress))
        other.progress.swap()  # in the capture, which launches nothing
        vars(other.progress).update(buffers)
    assert (one.progress.state[0] < 0).all()
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.progress.rr, other.progress.rr)
