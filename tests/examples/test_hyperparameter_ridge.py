"""Penalties by hypergradient: the fits, the errors and the gradient against scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.linear_model import Ridge

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def demo(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("hyperparameter_ridge")


@pytest.fixture(scope="module")
def data(demo: ModuleType) -> Any:
    return demo.diabetes()


@pytest.fixture
def log_penalty() -> torch.Tensor:
    return torch.linspace(-2, 8, 10, dtype=torch.float64).requires_grad_()


def test_every_fold_is_fitted_as_by_scikit_learn(demo, data, log_penalty):
    weights = demo.fits(log_penalty, data).detach()
    scale = (-log_penalty.detach() / 2).exp()  # scaled features turn the penalties into ones
    for used, w in zip(data.used.bool(), weights, strict=True):
        ridge = Ridge(alpha=1.0, fit_intercept=False)
        ridge.fit((scale * data.x[used]).numpy(), data.y[used].numpy())
        expected = scale * torch.from_numpy(ridge.coef_)
        # A residual of 1e-10 |b|; the penalty keeps the condition number below 1e4.
        torch.testing.assert_close(w, expected, rtol=0, atol=1e-6)


def test_the_hypergradient_is_the_slope_of_the_error(demo, data, log_penalty):
    error = demo.validation_error(demo.fits(log_penalty, data), data)
    (gradient,) = torch.autograd.grad(error, log_penalty)
    torch.testing.assert_close(gradient, demo.closed_form(log_penalty, data), rtol=1e-6, atol=1e-9)
    step = 1e-4
    for j in range(len(log_penalty)):
        moved = step * torch.eye(10, dtype=torch.float64)[j]
        ends = [
            demo.validation_error(demo.fits(log_penalty + s * moved, data), data) for s in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        # Central differences: step^2 from the third derivative, 1e-10 / step from the solves.
        assert abs(slope - gradient[j]) < 1e-5 * gradient.norm() + 1e-10 / step


def test_a_shared_penalty_has_the_error_that_grid_search_reports(demo, data):
    shared, reported = demo.grid_search(data)
    log_penalty = torch.full((10,), shared, dtype=torch.float64).log()
    error = demo.validation_error(demo.fits(log_penalty, data), data)
    assert error.item() == pytest.approx(reported, rel=1e-6)
    assert reported < demo.unpenalised(data)


def test_a_short_run_improves_on_grid_search(demo, data, tmp_path, capsys):
    tuned = demo.run(steps=10, out=tmp_path / "new")
    assert tuned.errors[-1] < min(tuned.errors[:-1])
    assert tuned.errors[0] == pytest.approx(demo.grid_search(data)[1], rel=1e-6)
    assert tuned.gradient_error < demo.MAX_ERROR
    assert (tmp_path / "new" / "hyperparameter_ridge.png").read_bytes().startswith(PNG_SIGNATURE)
    printed = capsys.readouterr().out
    assert f"{tuned.errors[-1]:.4f}" in printed
    assert f"{demo.held_out_error(tuned.penalty, data):.4f}" in printed


@pytest.mark.parametrize(("gradient_error", "code"), [(1e-8, 0), (1e-3, 1), (float("nan"), 1)])
def test_exit_code_says_whether_the_gradients_were_right(
    demo, monkeypatch, capsys, gradient_error, code
):
    tuned = demo.Tuned(torch.ones(10), [1.0], gradient_error)
    monkeypatch.setattr(demo, "run", lambda *_: tuned)
    assert demo.main([]) == code
    assert ("hypergradient" in capsys.readouterr().err) == bool(code)
