"""The passes and launches that the docs promise, counted; and the docs' generated table."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a dependency on Linux only")
tl = triton.language

from tests.kernels.dense_problems import dense_cg  # noqa: E402
from tools import ops_table  # noqa: E402
from tritonimplicit.fixed_point import Anderson  # noqa: E402
from tritonimplicit.linear_solve import (  # noqa: E402
    CG,
    GMRES,
    BiCGSTAB,
    FusedSolver,
    Jacobi,
    Neumann,
)
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
    "method", ["`CG`", "`CG(M=Jacobi())`", "`Neumann`", "`BiCGSTAB`", "`BiCGSTAB(M=...)`"]
)
def test_a_product_in_leaves_takes_no_more(method: str) -> None:
    rows, leaves = (
        ops_table.count_iteration(method, in_leaves=in_leaves) for in_leaves in (False, True)
    )
    assert (leaves.passes, leaves.launches) == (rows.passes, rows.launches)


@pytest.mark.parametrize("k", [7, 15])
@pytest.mark.parametrize(
    ("method", "slope", "rest", "launches"),
    [("`GMRES`, k vectors", 3, 5, 3), ("`Anderson`, k differences", 2, 9, 2)],
)
def test_each_vector_of_a_history_costs_what_is_promised(
    method: str, slope: int, rest: int, launches: int, k: int
) -> None:
    counted = ops_table.count_iteration(method, k)
    assert (counted.passes, counted.launches) == (slope * k + rest, launches)


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(7.0, 15.0, "k"), (8.0, 16.0, "k + 1"), (4.0, 4.0, "4"), (26.0, 50.0, "3 k + 5")],
)
def test_a_count_is_shown_in_k(low: float, high: float, shown: str) -> None:
    assert ops_table.in_k(low, high) == shown


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        ("`CG`", CG(backend="triton", rtol=0.0, maxiter=3)),
        ("`CG(M=Jacobi())`", CG(backend="triton", rtol=0.0, maxiter=3, M=Jacobi(1, seed=1))),
        ("`Neumann`", Neumann(backend="triton", rtol=0.0, maxiter=3)),
        ("`GMRES`, k vectors", GMRES(backend="triton", rtol=0.0, maxiter=3)),
        ("`BiCGSTAB`", BiCGSTAB(backend="triton", rtol=0.0, maxiter=3)),
        ("`BiCGSTAB(M=...)`", BiCGSTAB(backend="triton", rtol=0.0, maxiter=3, M=Jacobi(1))),
    ],
)
def test_a_solver_launches_its_iterations_ops(
    method: str, solver: FusedSolver | GMRES, monkeypatch: pytest.MonkeyPatch
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


def test_anderson_launches_its_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    for op in ops.SCHEMAS:
        run = getattr(kernels, op)
        monkeypatch.setattr(
            kernels, op, lambda *args, op=op, run=run: (launched.append(op), run(*args))
        )
    solver = Anderson(backend="triton", rtol=0.0, maxiter=3, on_failure="ignore")
    solver.solve(lambda z: torch.cos(z) * torch.linspace(0.1, 0.9, 20), torch.zeros(20))
    # A step mixes, evaluates f, and remembers.
    assert launched == ["anderson_mix", "anderson_dots"] * 3


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
