"""The tutorial's four gradients: TorchOpt's printed numbers, and closed forms in float64."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchopt_tutorial.py"
PRINTED = 5.1e-5  # half a unit of the fourth decimal, and float32's rounding
IMAML = ([[-0.0369, 0.0248, 0.0347, 0.0067]], [0.3156])
FIXED_POINT = (
    [
        [0.0272, 0.0031, -0.0156, -0.0238],
        [0.1004, 0.0113, -0.0573, -0.0878],
        [0.0666, 0.0075, -0.0380, -0.0583],
        [0.1446, 0.0163, -0.0826, -0.1265],
    ],
    [0.0574, 0.2114, 0.1403, 0.3046],
)


@pytest.fixture(scope="module")
def results() -> list[tuple[Tensor, Tensor]]:
    return runpy.run_path(str(EXAMPLE))["main"]()


@pytest.mark.parametrize(
    ("case", "printed"), [(0, IMAML), (1, IMAML), (2, IMAML), (3, FIXED_POINT)]
)
def test_printed_numbers(case, printed, results):
    for gradient, expected in zip(results[case], printed, strict=True):
        torch.testing.assert_close(gradient, torch.tensor(expected), rtol=0, atol=PRINTED)


def imaml_system() -> tuple[Tensor, Tensor]:
    """A u = g: the Hessian of mse + |p - m|^2 / 2 (d solution / d m = A^-1), the mean input."""
    torch.manual_seed(0)
    design = torch.cat([torch.randn(20, 4), torch.ones(20, 1)], dim=1).double()
    return 2 * design.T @ design / 20 + torch.eye(5, dtype=torch.float64), design.mean(0)


def fixed_point_system() -> tuple[Tensor, Tensor, Tensor]:
    """A^T u = g for x = W x + b and the mean of x; the tenth iterate, where it is taken."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(1, 4).double()
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    for _ in range(10):
        x = x @ weight.T + bias
    return torch.eye(4, dtype=torch.float64) - weight, torch.full((4,), 0.25).double(), x


def normal_cg_bound(a: Tensor, g: Tensor, rtol: float = 1e-5) -> float:
    """|u - u*| for |A A^T u - A g| <= rtol |A g|, and float32's rounding of the solve."""
    singular = torch.linalg.svdvals(a)
    tolerance = rtol * (a @ g).norm() / singular[-1] ** 2
    rounding = 5 * torch.finfo(torch.float32).eps * (singular[0] / singular[-1]) ** 2 * g.norm()
    return float(tolerance + rounding)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_imaml_is_the_closed_form(case, results):
    a, g = imaml_system()
    u = torch.linalg.solve(a, g)
    if case == 1:  # stopped at a residual of 1e-5 |g|, or after 101 terms of the series
        eigenvalues = torch.linalg.eigvalsh(a)
        left = (1 - 0.1 * eigenvalues).abs().max() ** 101
        rounding = 5 * torch.finfo(torch.float32).eps * (eigenvalues[-1] / eigenvalues[0])
        bound = float(((left + rounding) * u.norm()) + 1e-5 * g.norm() / eigenvalues[0])
    else:
        bound = normal_cg_bound(a, g)
    assert bound < PRINTED
    actual = torch.cat([t.flatten() for t in results[case]]).double()
    assert (actual - u).norm() <= bound


def test_fixed_point_is_the_closed_form(results):
    a, g, x = fixed_point_system()
    u = torch.linalg.solve(a.T, g)
    bound = normal_cg_bound(a, g)
    weight, bias = (t.double() for t in results[3])
    assert bound < 10 * PRINTED
    assert (bias - u).norm() <= bound
    assert (weight - u[:, None] * x).norm() <= bound * x.norm() + 1e-6 * u.norm()
