"""Fixed-point correction: states on the way, each with the gradient of one evaluation."""

import pytest
import torch
from torch import nn

from tritonimplicit.fixed_point import Anderson, Picard
from tritonimplicit.linear_solve import GMRES
from tritonimplicit.nn import (
    DEQ,
    JFB,
    SHINE,
    Implicit,
    Phantom,
    Unrolled,
    fixed_point_correction,
)

DOUBLE = torch.float64
PICARD = Picard(batch_ndim=1, rtol=1e-10, maxiter=200)
EXACT = Implicit(GMRES(batch_ndim=1, rtol=1e-12))


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.u = nn.Linear(5, 5, bias=False), nn.Linear(5, 5)

    def forward(self, z, x):
        return 0.7 * torch.tanh(self.w(z) + self.u(x))


def problem():
    torch.manual_seed(0)
    return Cell().to(DOUBLE), torch.randn(3, 5, dtype=DOUBLE)


@pytest.mark.parametrize("gradient", [EXACT, Phantom(3, 0.5), JFB()])
def test_states_are_evaluations_at_the_iterates(gradient):
    cell, x = problem()
    deq = DEQ(cell, solver=PICARD, gradient=gradient)
    *states, z = deq(x, corrections=(0, 2, 5))
    alone = deq(x)
    assert torch.equal(z, alone) and len(states) == 3
    iterate, wanted = torch.zeros_like(x), tuple(cell.parameters())
    for k in range(6):
        image = cell(iterate.detach(), x)  # Picard's next iterate
        if k in (0, 2, 5):
            state = states.pop(0)
            torch.testing.assert_close(state, image)
            pairs = [torch.autograd.grad(t.sum(), wanted) for t in (state, image)]
            for got, expected in zip(*pairs, strict=True):
                torch.testing.assert_close(got, expected)
        iterate = image
    pairs = [torch.autograd.grad(t.square().sum(), wanted) for t in (z, alone)]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_a_solver_that_has_ended_before_stays_at_its_end():
    cell, x = problem()
    deq = DEQ(cell, solver=Anderson(batch_ndim=1, rtol=1e-10))
    state, z = deq(x, corrections=(500,))
    assert torch.equal(state, cell(z.detach(), x))


def test_samples_that_are_frozen_stay():
    scale = torch.tensor([[0.0], [0.9]], dtype=DOUBLE)
    deq = DEQ(lambda z, x: scale * z + x, solver=PICARD)
    early, late, z = deq(torch.ones(2, 1, dtype=DOUBLE), corrections=(2, 9))
    assert early[0] == late[0] == z[0]
    assert early[1] < late[1] < z[1]


def test_several_scales_under_torch_func():
    def f(z, x):
        return {"a": 0.5 * z["a"].sin() + x, "b": 0.3 * z["b"] + z["a"].mean(1)}

    def loss(x):
        z0 = {"a": torch.zeros_like(x), "b": torch.zeros_like(x[:, 0])}
        states = DEQ(f, solver=PICARD, gradient=EXACT)(x, z0=z0, corrections=(1, 3))
        return fixed_point_correction(lambda z: z["b"].square().sum(), states)

    x = torch.rand(3, 2, dtype=DOUBLE, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


def test_the_sum_of_losses():
    states = [torch.tensor(v, dtype=DOUBLE) for v in (2.0, 3.0, 5.0)]
    got = fixed_point_correction(lambda z: z.square(), states, decay=0.5)
    assert got == 0.25 * 4 + 0.5 * 9 + 25
    assert fixed_point_correction(lambda z: z, states[:1]) == 2


def test_it_shortens_the_way():
    def trained(corrections):
        torch.manual_seed(0)
        cell, x = problem()
        deq = DEQ(cell, solver=Picard(batch_ndim=1, rtol=1e-3, maxiter=300))
        target = 0.3 * torch.randn(3, 5, dtype=DOUBLE)
        optimiser = torch.optim.Adam(deq.parameters(), lr=0.02)
        for _ in range(40):
            states = deq(x, corrections=corrections)
            states = states if corrections else [states]
            loss = fixed_point_correction(lambda z: (z - target).square().mean(), states)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        *_, early, z = deq(x, corrections=(2,))
        return (early - z).norm() / z.norm()

    assert trained((2, 4)) < trained(())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda deq, x: deq(x, corrections=(3, 1)), ValueError, "must ascend"),
        (lambda deq, x: deq(x, corrections=(3, 3)), ValueError, "must ascend"),
        (lambda deq, x: deq(x, corrections=(0.5,)), TypeError, "number of iterations"),
        (lambda deq, x: fixed_point_correction(torch.sum, []), ValueError, "no states"),
        (lambda deq, x: fixed_point_correction(torch.sum, [x], 0), ValueError, "positive"),
        (
            lambda deq, x: DEQ(deq.layer, gradient=Unrolled(9))(x, corrections=(1,)),
            ValueError,
            "which Unrolled has not",
        ),
        (lambda deq, x: DEQ(deq.layer, gradient=SHINE())(x), TypeError, "Broyden"),
    ],
)
def test_misuse(make, error, message):
    cell, x = problem()
    with pytest.raises(error, match=message):
        make(DEQ(cell), x)
