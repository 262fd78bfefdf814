"""`record_solves` collects every solve, those of backward passes too."""

import pytest
import torch

import tritonimplicit as ti
from tritonimplicit.linear_solve import CG, Dense, NormalCG

DOUBLE = torch.float64
SCALE = torch.logspace(0, -2, 20, dtype=DOUBLE)


def solve(solver, systems=3):
    b = torch.ones(systems, 20, dtype=DOUBLE) * torch.tensor([[1.0], [2.0], [0.0]])[:systems]
    return solver(lambda v: SCALE * v, b)


def test_each_solve_is_collected_with_its_history():
    with ti.record_solves() as log:
        x = solve(CG(batch_ndim=1, rtol=1e-8))
        solve(Dense(batch_ndim=1))
    first, second = log
    assert (first.solver, second.solver) == ("CG", "Dense")
    assert torch.equal(first.value, x) and second.history is None
    norms, iterations = first.history, first.iterations
    assert norms.shape == (int(iterations.max()) + 1, 3)
    torch.testing.assert_close(norms[0], torch.tensor([20**0.5, 2 * 20**0.5, 0.0], dtype=DOUBLE))
    assert (norms[-1] <= 1e-8 * norms[0]).all()
    # A history is that of the recurrence; in float64 it ends where the true residual is.
    torch.testing.assert_close(norms[-1], first.residual_norm, rtol=1e-3, atol=1e-12)


def test_a_stopped_system_keeps_its_last_norm():
    scale = torch.stack([torch.ones(20, dtype=DOUBLE), SCALE])
    with ti.record_solves() as log:
        CG(batch_ndim=1)(lambda v: scale * v, torch.ones(2, 20, dtype=DOUBLE))
    norms = log[0].history
    assert len(norms) > 5
    assert (norms[1:, 0] == norms[1, 0]).all()
    assert torch.equal(CG()(lambda v: v, torch.ones(20)), torch.ones(20)) and len(log) == 1


def test_the_history_of_a_system_that_breaks_is_finite_until_then():
    with ti.record_solves() as log:
        CG(batch_ndim=1, on_failure="ignore", maxiter=50)(
            lambda v: torch.stack([SCALE, -SCALE * torch.linspace(-1, 1, 20)]) * v,
            torch.ones(2, 20, dtype=DOUBLE),
        )
    assert log[0].status.tolist()[1] == ti.Status.INDEFINITE
    assert log[0].history.isfinite().all()


def test_solves_of_backward_passes_are_collected():
    a = torch.full((2,), 4.0, dtype=DOUBLE, requires_grad=True)
    root = ti.custom_root(lambda x, a: x * x - a, argnums=1, solve=NormalCG())
    with ti.record_solves() as outer:
        x = root(lambda x, a: a.sqrt())(torch.ones(2, dtype=DOUBLE), a)
        assert len(outer) == 0
        with ti.record_solves() as inner:
            x.sum().backward()
        solve(CG(batch_ndim=1))
    assert [s.solver for s in outer] == ["NormalCG", "CG"]
    assert len(inner) == 1 and inner[0] is outer[0]


def test_a_log_closes_with_an_error():
    with pytest.raises(RuntimeError, match="mine"), ti.record_solves() as log:
        raise RuntimeError("mine")
    solve(CG(batch_ndim=1))
    assert len(log) == 0


def test_rows_for_loggers_and_a_table_for_readers():
    with ti.record_solves() as log:
        solve(CG(batch_ndim=1, maxiter=5, rtol=1e-12))
    (row,) = log.to_dicts()
    assert row["solver"] == "CG" and row["systems"] == 3
    assert row["status_max_iterations"] == 2 and row["status_converged"] == row["converged"] == 1
    assert row["iterations_max"] == 5 and row["iterations_mean"] == pytest.approx(10 / 3)
    assert all(isinstance(value, (int, float, str)) for value in row.values())
    header, line = log.summary().splitlines()
    assert header.split()[:3] == ["solve", "solver", "systems"]
    assert "CG" in line and "3.3 (max 5)" in line and "1 CONVERGED, 2 MAX_ITERATIONS" in line
    with ti.record_solves() as empty:
        pass
    assert empty.to_dicts() == [] and len(empty.summary().splitlines()) == 1


def test_convergence_curves(tmp_path):
    pytest.importorskip("matplotlib")
    with ti.record_solves() as log:
        solve(CG(batch_ndim=1))
        solve(NormalCG(batch_ndim=1, rtol=1e-2))
    path = tmp_path / "curves.png"
    log.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with ti.record_solves() as dense:
        solve(Dense(batch_ndim=1))
    with pytest.raises(ValueError, match="nothing to plot"):
        dense.plot(path)
