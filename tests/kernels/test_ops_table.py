"""The passes and launches that the docs promise, counted; and the docs' generated table."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a dependency on Linux only")
tl = triton.language

from tests.kernels.dense_problems import dense_cg  # noqa: E402
from tools import ops_table  # noqa: E402
from tritonimplicit.linear_solve import CG, BiCGSTAB, FusedSolver, Jacobi, Neumann  # noqa: E402
from tritonimplicit_kernels import ops  # noqa: E402
from tritonimplicit_kernels import triton as kernels  # noqa: E402

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(
    ("method", "passes", "launches"),
    [
        ("`CG`", 9, 2),
        ("`CG(M=Jacobi())`", 11, 2),
        ("`Neumann`", 4, 1),
        ("`BiCGSTAB`", 16, 4),
        ("`BiCGSTAB(M=...)`", 18, 4),
    ],
)
def test_an_iteration_is_as_lean_as_promised(method: str, passes: int, launches: int) -> None:
    counted = ops_table.count_iteration(method)
    assert (counted.passes, counted.launches) == (passes, launches)


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        ("`CG`", CG(backend="triton", rtol=0.0, maxiter=3)),
        ("`CG(M=Jacobi())`", CG(backend="triton", rtol=0.0, maxiter=3, M=Jacobi(1, seed=1))),
        ("`Neumann`", Neumann(backend="triton", rtol=0.0, maxiter=3)),
        ("`BiCGSTAB`", BiCGSTAB(backend="triton", rtol=0.0, maxiter=3)),
        ("`BiCGSTAB(M=...)`", BiCGSTAB(backend="triton", rtol=0.0, maxiter=3, M=Jacobi(1))),
    ],
)
def test_a_solver_launches_its_iterations_ops(
    method: str, solver: FusedSolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    for op in ops.SCHEMAS:
        run = getattr(kernels, op)
        monkeypatch.setattr(
            kernels, op, lambda *args, op=op, run=run: (launched.append(op), run(*args))
        )
    matrix = torch.linspace(0.5, 1.5, 20).diag() + 0.01  # with 20 eigenvalues: not solved in 3
    solver.solve(lambda v: matrix @ v, torch.linspace(1, 2, 20))
    assert launched == list(ops_table.ITERATIONS[method]) * 3


def test_a_whole_solve_reads_its_matrix_once() -> None:
    problem = dense_cg(2, 40, torch.float32)
    counted = ops_table.count_on("dense_cg", vars(problem))
    assert (counted.launches, counted.reads, counted.writes) == (1, 1, 0)
    assert (problem.state[1] > 5).all()


def test_the_docs_have_the_table_of_today() -> None:
    page = ops_table.PAGE.read_text()
    assert ops_table.with_table(page) == page, "run make ops-table"


@triton.jit
def _known_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Read x twice and y once with a masked end, write y; 2 operations an element."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    x += tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(y_ptr + offsets, x * tl.load(y_ptr + offsets, mask=mask, other=0.0), mask=mask)


def test_the_meter_counts_what_is_known() -> None:
    x, y = torch.ones(96), torch.ones(96)
    meter = ops_table.Meter([x, y])
    with meter.running():
        _known_kernel[(3,)](x, y, 96, BLOCK=32)
        _known_kernel[(2,)](x, y, 48, BLOCK=32)  # half of it, of a last block half too
    flops = 2 * (96 + 64) / 96  # masked lanes count
    assert meter.total == ops_table.Count(launches=2, reads=4.5, writes=1.5, flops=flops)
    assert meter.total.passes == 6.0
    assert torch.equal(y[:48], torch.full((48,), 4.0)) and torch.equal(y[48:], 2 * x[48:])
