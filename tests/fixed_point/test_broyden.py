"""Broyden's method: its updates against float64, its vector work by the kernels' ops."""

import dataclasses

import pytest
import torch

from tests.fixed_point.test_solvers import contraction
from tritonimplicit import Status
from tritonimplicit.fixed_point import Broyden

every_update = pytest.mark.parametrize("update", ["good", "bad"])


def coupled(samples, n, dtype=torch.float32, device="cpu"):
    """z -> sin(W z) + c, ‖W‖ = 0.9, another c for each sample."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    c = torch.randn(samples, n, generator=generator, dtype=torch.float64).to(device, dtype)
    w = (0.9 * rotation).to(device, dtype)
    return lambda z: torch.sin(z @ w.T) + c


@every_update
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=pytest.mark.interpreter)])
def test_every_update_meets_its_secant_in_float64(update, dtype, backend):
    """H y = s after each, s and y the differences of the iterates that f has seen."""
    n, samples, seen = 40, 2, []
    f = coupled(samples, n, dtype)
    for steps in range(3, 9):
        seen.clear()
        solver = Broyden(batch_ndim=1, update=update, rtol=0.0, maxiter=steps, on_failure="ignore")
        solver = solver if backend is None else dataclasses.replace(solver, backend=backend)
        _, inverse = solver.solve_with_inverse(
            lambda z: (seen.append(z.clone()), f(z))[1], torch.zeros(samples, n, dtype=dtype)
        )
        z0, z1 = seen[steps - 2], seen[steps - 1]  # the last step is not learnt from
        r0, r1 = f(z0) - z0, f(z1) - z1
        s, y = (z1 - z0).double(), (r1 - r0).double()
        left, right = inverse.left[..., :n].double(), inverse.right[..., :n].double()
        assert len(left) == steps - 1
        along = (right * y).sum(2, keepdim=True)
        # s - H y is made of H r1 and H r0 with the updates before: a rounding for each of their
        # terms, and sqrt(n) of them for each dot. The last update carries it on undiminished.
        residuals = r0.double().norm(dim=1) + r1.double().norm(dim=1)
        size = s.norm(dim=1) + residuals * (1 + left[:-1].norm(dim=2).sum(0))
        bound = (n**0.5 + steps) * torch.finfo(dtype).eps * size
        secant = (left * along).sum(0) - y - s
        assert (secant.norm(dim=1) <= bound).all()
        assert (s.norm(dim=1) > 50 * bound).all()  # and so the bound says something


@every_update
@pytest.mark.parametrize("memory", [4, 30])
@pytest.mark.parametrize("n", [24, 20_000])
def test_a_samples_iterates_and_inverse_are_the_same_alone(update, n, memory):
    """Also where it has stopped long before the others, which begin again with little memory.

    And in rows that BLAS adds up by itself.
    """
    a, b, f = contraction(samples=4, n=n, dtype=torch.float32)
    solver = Broyden(batch_ndim=1, update=update, rtol=1e-4, memory=memory, maxiter=30)
    together, inverse = solver.solve_with_inverse(f, torch.zeros_like(b))
    assert len(set(together.iterations.tolist())) > 1
    for i in range(len(b)):
        one = slice(i, i + 1)
        alone, own = solver.solve_with_inverse(
            lambda z, i=one: f(z, a[i], b[i]), torch.zeros_like(b[one])
        )
        assert torch.equal(alone.value[0], together.value[i])
        assert alone.iterations == together.iterations[i]
        k = len(own.left)
        for ours, theirs in ((inverse.left, own.left), (inverse.right, own.right)):
            assert torch.equal(ours[:k, one], theirs)
            assert not ours[k:, i].any()  # it has learnt nothing since


@every_update
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triton_goes_the_references_way(update, dtype, device):
    f, z0 = coupled(3, 37, dtype, device), torch.zeros(3, 37, dtype=dtype, device=device)
    solver = Broyden(batch_ndim=1, update=update, rtol=1e-4, maxiter=60)
    got, expected = (
        dataclasses.replace(solver, backend=name).solve(f, z0) for name in ("triton", "reference")
    )
    assert (got.status == Status.CONVERGED).all() and (expected.status == Status.CONVERGED).all()
    assert (got.iterations - expected.iterations).abs().max() <= 1
    # Both have residuals below 1e-4 ‖f(z)‖; f contracts by 0.9, so that each is at most ten times
    # as far from the fixed point.
    apart = (got.value - expected.value).norm(dim=1)
    assert (apart <= 2 * 1e-4 / 0.1 * f(got.value).norm(dim=1)).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(("update", "products"), [("good", 2), ("bad", 1)])
def test_an_iteration_is_one_or_two_products_with_the_history(update, products, monkeypatch):
    from tritonimplicit_kernels import triton as kernels

    launched = []
    for op in ("multi_dot", "anderson_mix"):
        run = getattr(kernels, op)
        monkeypatch.setattr(
            kernels, op, lambda *args, op=op, run=run: (launched.append(op), run(*args))
        )
    solver = Broyden(batch_ndim=1, update=update, rtol=0.0, maxiter=6, on_failure="ignore")
    dataclasses.replace(solver, backend="triton").solve(coupled(2, 20), torch.zeros(2, 20))
    # The first step knows no update yet, and what the second one learns from is H = -I.
    assert launched == ["multi_dot", "anderson_mix"] * (products * 4)
