"""The trained models, and how torchdeq's solvers are stopped."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from bench.case import Setting
from bench.deq import gradients, torchdeq_solvers
from bench.deq.equilibrium import MODELS, exact_adjoint, norms, relative, trained
from bench.deq.torchdeq_solvers import SOLVERS
from bench.models import MODELS as BY_NAME
from bench.models import load, text
from bench.models.base import WEIGHTS
from bench.models.language import CONTEXT
from bench.models.train import closed, fit
from tritonimplicit.fixed_point import Anderson
from tritonimplicit.linear_solve import solve_gmres

QUICK = Setting(torch.device("cpu"), quick=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_problem_is_at_the_fixed_point(name):
    problem = trained(name, QUICK)
    exact = problem.double()
    # z was rounded to float32, once.
    assert relative(exact.f(exact.z) - exact.z, exact.z, "worst") < 1e-6
    assert problem.z.dtype == torch.float32
    assert (norms(problem.cotangent) > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_is_a_system_of_its_own(name):
    problem = trained(name, QUICK)
    first = problem.vjp()(problem.cotangent)[:1]
    others = problem.cotangent.clone()
    others[1:] = 0
    torch.testing.assert_close(problem.vjp()(others)[:1], first)


def test_the_language_model_does_not_contract():
    exact = trained("lm", QUICK).double()
    vjp, g = exact.vjp(), exact.cotangent
    grown = gradients.neumann(101, vjp, g) - gradients.neumann(100, vjp, g)
    assert relative(grown, g, "worst") > 1


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_small_and_the_predictions_good(name):
    assert (WEIGHTS / f"{name}.pt").stat().st_size < 1_000_000
    problem = trained(name, QUICK)
    loss = load(name, QUICK.device).loss(problem.z, problem.y).item()
    # In nats: by chance 5.5 for a byte and 2.3 for a digit.
    assert loss < (2.4 if name == "lm" else 0.5)


def test_the_exact_adjoint_is_that_of_the_dense_jacobian():
    exact = trained("conv", QUICK).double()
    z, inputs = exact.z[:1], (exact.inputs[0][:1], exact.inputs[1])
    jacobian = torch.func.jacrev(lambda z: exact.model.cell(z, *inputs))(z)
    matrix = torch.eye(z.numel()) - jacobian.reshape(z.numel(), z.numel())
    u = torch.linalg.solve(matrix.T, exact.cotangent[:1].flatten())
    found = exact_adjoint("conv", QUICK)[:1].flatten()
    torch.testing.assert_close(found, u, rtol=1e-7, atol=1e-9 * u.abs().max().item())


def test_a_phantom_gradient_is_autograd_through_its_steps():
    exact = trained("conv", QUICK).double()
    model, parameters = exact.model, dict(exact.model.named_parameters())

    class Steps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            inputs, z = self.model.inputs(exact.x), exact.z
            for _ in range(3):
                z = 0.5 * z + 0.5 * self.model.cell(z, *inputs)
            return z

    z = functional_call(Steps(), {f"model.{k}": p for k, p in parameters.items()}, ())
    expected = torch.autograd.grad(z, model.weight, exact.cotangent)[0]
    u = gradients.phantom(3, 0.5, exact.vjp(), exact.cotangent)
    (found,) = (g for g in gradients.pulled_back(exact, u) if g.shape == expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_training_lessens_the_loss(name, capsys):
    torch.manual_seed(0)
    model = BY_NAME[name]().train()
    problem = trained(name, QUICK)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    model.normalise(20)
    losses = []

    def batches():
        for _ in range(6):
            with torch.no_grad():
                z = Anderson(batch_ndim=1)(closed(model, problem.x), model.start(problem.x))
                losses.append(model.loss(z, problem.y).item())
            yield problem.x, problem.y

    solvers = Anderson(batch_ndim=1), solve_gmres(batch_ndim=1)
    fit(model, batches(), optimiser, schedule, *solvers)
    assert losses[-1] < 0.9 * losses[0]
    assert capsys.readouterr().out.startswith(f"{name} 0: ")


def test_held_out_text_is_apart():
    train, held_out = text._corpus()
    assert 0.04 < len(held_out) / (len(train) + len(held_out)) < 0.06
    ((x, y),) = text.batches(1, 3, CONTEXT, seed=0)
    assert x.shape == y.shape == (3, CONTEXT)
    assert torch.equal(x[:, 1:], y[:, :-1])


# --- torchdeq's solvers, by a stand-in -----------------------------------------------------------


def halved(f, start, max_iter, tol, indexing=(), stop_mode="abs"):
    """A fixed-point iteration as torchdeq's: the estimate after k evaluations is its k-th."""
    z, kept = start, []
    for k in range(1, max_iter + 1):
        z = f(z)
        if k in indexing:
            kept.append(z)
    return z, kept, None


@pytest.mark.parametrize(("accuracy", "needed"), [(1e-3, 10), (1e-12, 40), (0.0, None)])
def test_the_least_iterations_that_reach_are_found(accuracy, needed):
    start, calls = torch.ones(1, dtype=torch.float64), []

    def f(z):
        calls.append(z)
        return 0.5 * z

    found = torchdeq_solvers._least(halved, SOLVERS[0], f, start, lambda z: bool(0 < z <= accuracy))
    assert found == (needed or torchdeq_solvers.LIMIT)
    if needed:
        assert halved(f, start, found, 0.0)[0] <= accuracy
        assert found == math.ceil(-math.log2(accuracy))
