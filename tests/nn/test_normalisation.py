"""Normalised weights: norms against SVDs and the true maps, derivatives to second order."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tritonimplicit.fixed_point import Anderson
from tritonimplicit.linear_solve import GMRES
from tritonimplicit.nn import DEQ, Implicit, spectral_norm, weight_norm

DOUBLE = torch.float64


def operator_norm(module, *shape):
    """Of x -> module(x) without its bias, by all of its columns."""
    n = torch.Size(shape).numel()
    columns = torch.eye(n, dtype=DOUBLE).view(n, *shape)
    with torch.no_grad():
        image = module(columns) - module(torch.zeros(1, *shape, dtype=DOUBLE))
    return torch.linalg.matrix_norm(image.flatten(1), 2)


def settled(layer):
    """After the power iterations of many forward passes."""
    for _ in range(300):
        for module in layer.modules():
            if parametrize.is_parametrized(module):
                _ = module.weight
    return layer.eval()


@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0])
def test_a_linear_map_has_the_bound_for_its_norm(bound):
    torch.manual_seed(0)
    layer = settled(spectral_norm(nn.Linear(7, 4).to(DOUBLE), bound))
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2).item(), bound)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 9)),
        (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 6, 6)),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (4, 5, 5)),
        (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular"), (2, 6, 6)),
        (lambda: nn.Conv1d(2, 2, 3, padding=2, dilation=2, padding_mode="circular"), (2, 9)),
        (lambda: nn.Conv1d(1, 1, 4, padding="same", padding_mode="circular"), (1, 8)),
        (lambda: nn.Conv2d(1, 1, 3, padding=1), (1, 6, 6)),
        (lambda: nn.Conv2d(3, 2, 1), (3, 4, 4)),
    ],
)
def test_a_convolution_stays_within_the_bound(make, shape):
    torch.manual_seed(0)
    layer = make().to(DOUBLE)
    with torch.no_grad():
        layer.weight.fill_(0.3)  # where the bound is nearly reached
        layer.weight += 0.01 * torch.randn_like(layer.weight)
    norm = operator_norm(settled(spectral_norm(layer, 0.9)), *shape)
    assert 0.45 < norm <= 0.9 * (1 + 1e-9)


def test_every_linear_map_of_a_layer_and_nothing_else():
    layer = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Sequential(nn.Conv1d(3, 3, 1)))
    for normalise in (spectral_norm, weight_norm):
        copied = copy.deepcopy(layer)
        assert normalise(copied) is copied
        found = [name for name, m in copied.named_modules() if parametrize.is_parametrized(m)]
        assert found == ["0", "2.0"]


def test_weight_norm_begins_as_it_was_and_ends_as_a_parameter():
    layer = nn.Conv2d(2, 3, 3).to(DOUBLE)
    before = layer.weight.detach().clone()
    weight_norm(layer)
    torch.testing.assert_close(layer.weight, before)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer.weight.detach(), before)
    assert list(layer.state_dict()) == ["bias", "weight"]


def test_weight_norm_is_torchs_with_right_second_derivatives():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 4).to(DOUBLE), nn.Linear(3, 4).to(DOUBLE)
    weight_norm(ours)
    torch.nn.utils.parametrizations.weight_norm(theirs)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.weight, theirs.weight)

    def weight(g, v):
        return ours.parametrizations.weight[0](g, v)

    original = ours.parametrizations.weight
    inputs = [t.detach().clone().requires_grad_() for t in (original.original0, original.original1)]
    assert torch.autograd.gradcheck(weight, inputs)
    assert torch.autograd.gradgradcheck(weight, inputs)


class Cell(nn.Module):
    def __init__(self, normalise):
        super().__init__()
        self.w, self.u = normalise(nn.Linear(5, 5, bias=False)), nn.Linear(5, 5)

    def forward(self, z, x):
        return torch.tanh(self.w(z) + self.u(x))


@pytest.mark.parametrize("normalise", [lambda m: spectral_norm(m, 0.8), weight_norm])
def test_in_a_deq_their_gradient_is_that_of_the_unrolled_iteration(normalise):
    torch.manual_seed(0)
    cell = Cell(normalise).to(DOUBLE)
    x = torch.randn(3, 5, dtype=DOUBLE)
    cell(x, x)
    cell.eval()
    if normalise is weight_norm:
        with torch.no_grad():
            cell.w.parametrizations.weight.original0.mul_(0.5)
    wanted = tuple(cell.parameters())
    deq = DEQ(
        cell,
        solver=Anderson(batch_ndim=1, rtol=1e-13, maxiter=200),
        gradient=Implicit(GMRES(batch_ndim=1, rtol=1e-13)),
    )
    z = torch.zeros_like(x)
    for _ in range(300):
        z = cell(z, x)
    pairs = [torch.autograd.grad(t.square().sum(), wanted) for t in (deq(x), z)]
    for got, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spectral_norm(nn.Linear(2, 2), 0.0), "bound must be positive"),
        (lambda: spectral_norm(nn.ReLU()), "no Linear and no Conv in ReLU"),
        (lambda: weight_norm(nn.LayerNorm(2)), "no Linear and no Conv in LayerNorm"),
        (lambda: spectral_norm(nn.ConvTranspose2d(1, 1, 3)), "no bound for a ConvTranspose2d"),
        (
            lambda: spectral_norm(nn.Conv1d(1, 1, 3, padding=1, padding_mode="replicate")),
            "no bound for padding_mode='replicate'",
        ),
        (
            lambda: spectral_norm(nn.Conv2d(1, 1, (3, 1), padding=1, padding_mode="circular")),
            r"padding=\(1, 1\), padding_mode=circular\): a circular padding of more",
        ),
        (lambda: weight_norm(weight_norm(nn.Linear(2, 2))), "parametrised weight already"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
