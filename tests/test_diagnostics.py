"""What a solve says of itself, and what follows from it."""

import warnings

import pytest
import torch

import tritonimplicit as ti
from tritonimplicit.diagnostics import report_failures, statuses_in
from tritonimplicit.linear_solve import CG

INDEFINITE, MAXITER = ti.Status.INDEFINITE, ti.Status.MAX_ITERATIONS


def solution(*status):
    count = len(status)
    return ti.Solution(
        value=torch.zeros(count, 2),
        status=torch.tensor(status, dtype=torch.int32),
        iterations=torch.zeros(count, dtype=torch.int32),
        residual_norm=torch.arange(count, dtype=torch.float64),
        solver="CG",
    )


def report(solved, expected=frozenset(), on_failure="warn"):
    report_failures(solved, statuses_in(solved.status), expected, on_failure)


def test_converged_is_zero_and_every_status_has_advice():
    assert ti.Status.CONVERGED == 0
    assert len({status.advice for status in ti.Status}) == len(ti.Status)


def test_the_statuses_that_occur():
    assert statuses_in(solution(0, INDEFINITE, 0).status) == {ti.Status.CONVERGED, INDEFINITE}
    assert statuses_in(torch.tensor(MAXITER, dtype=torch.int32)) == {MAXITER}
    for status in ti.Status:
        assert statuses_in(solution(status, status).status) == {status}


def test_one_warning_for_each_status_that_is_not_expected():
    failed = solution(INDEFINITE, 0, INDEFINITE, MAXITER)
    with pytest.warns(ti.ConvergenceWarning, match="^CG: some of 4 systems found") as caught:
        report(failed, frozenset({MAXITER}))
    assert len(caught) == 1


def test_the_same_failure_is_shown_once_by_pythons_default_filter():
    matrix = torch.tensor([1.0, -1.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for scale in (1.0, 2.0, 3.0):
            CG()(lambda v, scale=scale: scale * matrix * v, torch.ones(2))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_an_error_counts_and_carries_the_solution():
    failed = solution(INDEFINITE, 0, INDEFINITE, MAXITER)
    with pytest.raises(ti.ConvergenceError, match=r"1 of 4 .* 3\.0e\+00.*; 2 of 4 ") as caught:
        report(failed, on_failure="raise")
    assert caught.value.solution is failed


def test_nothing_is_said_where_all_is_well_or_ignored():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(solution(0, 0))
        report(solution(0, MAXITER), frozenset({MAXITER}), on_failure="raise")
        CG(on_failure="ignore")(lambda v: torch.tensor([1.0, -1.0]) * v, torch.ones(2))


def test_on_failure_is_a_field():
    with pytest.raises(ti.ConvergenceError, match="indefinite"):
        CG(on_failure="raise")(lambda v: torch.tensor([1.0, -2.0]) * v, torch.ones(2))
    with pytest.raises(ValueError, match="'warn', 'raise', 'ignore'"):
        CG(on_failure="shout")


def test_a_warning_in_a_backward_pass_points_at_the_call_of_backward():
    a = torch.ones(2, requires_grad=True)
    scale = torch.tensor([1.0, -2.0])
    root = ti.custom_root(lambda x, a: scale * x - a, argnums=1, solve=CG())
    x = root(lambda x, a: a / scale)(torch.zeros(2), a)
    with pytest.warns(ti.ConvergenceWarning, match="indefinite") as caught:
        x.sum().backward()
    assert caught[0].filename == __file__


def test_a_solution_is_printed_without_its_vectors():
    scale = torch.tensor([[1.0, 2.0], [1.0, -2.0]]).repeat(500, 1)
    many = CG(batch_ndim=1).solve(lambda v: scale * v, torch.ones(1000, 2))
    shown = "Solution(CG, 500 CONVERGED, 500 INDEFINITE, iterations 1 to 2, residual norms "
    assert repr(many).startswith(shown) and len(repr(many)) < 100
    one = CG().solve(lambda v: scale[0] * v, torch.ones(2))
    assert repr(one).startswith("Solution(CG, 1 CONVERGED, iterations 2 to 2, residual norms ")
