"""The size of df/dz: its estimates against closed forms."""

import math

import pytest
import torch

from tritonimplicit.nn import jacobian_penalty, spectral_radius

DOUBLE = torch.float64


def test_the_spectral_radius_of_linear_maps():
    rotation = 0.8 * torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]])
    matrices = torch.stack([rotation, torch.tensor([[0.5, 2.0], [0.0, -1.5]])]).double()
    z = torch.zeros(2, 2, dtype=DOUBLE)
    got = spectral_radius(lambda z: (matrices @ z[..., None])[..., 0], z, steps=60)
    torch.testing.assert_close(got, torch.tensor([0.8, 1.5], dtype=DOUBLE), rtol=1e-6, atol=0)


def test_the_spectral_radius_of_a_pytree_leaves_random_numbers_alone():
    z = {"a": torch.ones(3, 2), "b": (torch.ones(3, 4),)}
    state = torch.get_rng_state()
    got = spectral_radius(lambda z: {"a": 0.5 * z["a"], "b": (-2 * z["b"][0],)}, z, steps=60)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got, torch.full((3,), 2.0, dtype=DOUBLE), rtol=1e-5, atol=0)


def test_a_nilpotent_and_a_broken_map():
    assert spectral_radius(lambda z: 0 * z, torch.ones(1, 2)) == 0
    assert spectral_radius(lambda z: math.nan * z, torch.ones(1, 2)).isnan()


def test_the_penalty_is_the_mean_square_of_the_jacobian():
    scale = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]], dtype=DOUBLE, requires_grad=True)
    z = torch.randn(2, 3, dtype=DOUBLE)
    torch.manual_seed(0)
    samples = torch.stack([jacobian_penalty(lambda z: scale * z, z) for _ in range(4000)])
    # Each is sum (s v)² / 6, of variance 2 sum s⁴ / 36; five standard deviations of the mean.
    expected = scale.square().sum() / 6
    deviation = (2 * scale.pow(4).sum() / 36 / 4000).sqrt()
    assert (samples.mean() - expected).abs() < 5 * deviation
    (grad,) = torch.autograd.grad(samples.mean(), scale)
    slack = 5 * (2 * (scale / 3).square() / 4000).sqrt()
    assert ((grad - scale / 3).abs() <= slack).all()


def test_the_penalty_takes_z_for_constant():
    z = torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
    w = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    penalty = jacobian_penalty(lambda z: torch.sin(w * z), z)
    assert torch.autograd.grad(penalty, z, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(penalty, w)[0].abs() > 0


def test_misuse():
    with pytest.raises(ValueError, match="steps must be at least 2"):
        spectral_radius(torch.sin, torch.ones(1, 2), steps=1)
    with pytest.raises(ValueError, match="the result of f has a leaf of shape"):
        spectral_radius(lambda z: z[:, :1], torch.ones(1, 2))


def test_the_radius_of_a_layer_that_does_not_use_z_is_zero() -> None:
    z = torch.randn(3, 4)
    assert torch.equal(spectral_radius(torch.ones_like, z), torch.zeros(3, dtype=torch.float64))
