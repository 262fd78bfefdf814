"""What a solve says of itself."""

import warnings

import pytest
import torch

import tritonimplicit as ti
from tritonimplicit.diagnostics import warn_of_failures


def solution(*status):
    count = len(status)
    return ti.Solution(
        value=torch.zeros(count, 2),
        status=torch.tensor(status, dtype=torch.int32),
        iterations=torch.zeros(count, dtype=torch.int32),
        residual_norm=torch.arange(count, dtype=torch.float64),
    )


def test_converged_is_zero_and_every_status_has_advice():
    assert ti.Status.CONVERGED == 0
    assert len({status.advice for status in ti.Status}) == len(ti.Status)


def test_one_warning_for_each_status_that_is_not_expected():
    failed = solution(ti.Status.INDEFINITE, 0, ti.Status.INDEFINITE, ti.Status.MAX_ITERATIONS)
    with pytest.warns(ti.ConvergenceWarning) as caught:
        warn_of_failures(failed, "CG", frozenset({ti.Status.MAX_ITERATIONS}))
    (warning,) = caught
    assert "CG: 2 of 4 systems" in str(warning.message) and "2.0e+00" in str(warning.message)


def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_failures(solution(0, 0), "CG", frozenset())
