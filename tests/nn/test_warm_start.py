"""Warm starts by the number of the sample: whose they are, how long they last, what they save."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tritonimplicit import Solution, Status
from tritonimplicit.fixed_point import Anderson, Broyden, Picard
from tritonimplicit.linear_solve import GMRES
from tritonimplicit.nn import DEQ, JFB, SHINE, Implicit, Unrolled, WarmStart

DOUBLE = torch.float64
SOLVER = Anderson(batch_ndim=1, rtol=1e-10, maxiter=100)
GRADIENT = Implicit(GMRES(batch_ndim=1, rtol=1e-10))


class Cell(nn.Module):
    def __init__(self, n=5):
        super().__init__()
        self.w, self.u = nn.Linear(n, n, bias=False), nn.Linear(n, n)

    def forward(self, z, x):
        return 0.7 * torch.tanh(self.w(z) + self.u(x))


def problem(size=8, *, adjoint=False, samples=4):
    torch.manual_seed(0)
    cell, x = Cell().to(DOUBLE), torch.randn(samples, 5, dtype=DOUBLE)
    warm = WarmStart(size, adjoint=adjoint)
    return DEQ(cell, solver=SOLVER, gradient=GRADIENT, warm_start=warm), x


def numbers(*index):
    return torch.tensor(index)


def iterations(deq):
    return deq.last.forward.iterations.tolist()


def test_a_sample_starts_where_it_ended():
    deq, x = problem()
    z = deq(x, index=numbers(3, 1, 0, 7))
    assert all(k > 3 for k in iterations(deq))
    again = deq(x.flip(0), index=numbers(7, 0, 1, 3))
    assert torch.equal(again, z.flip(0)) and iterations(deq) == [0, 0, 0, 0]


def test_a_new_sample_starts_as_without_warm_starts():
    deq, x = problem()
    cold = deq(x)
    counts = iterations(deq)
    deq(x[:2], index=numbers(0, 1))
    z = deq(x, index=numbers(4, 1, 2, 0))  # x[1] is number 1, and x[3] has another's z
    assert torch.equal(z[::2], cold[::2])
    assert iterations(deq)[::2] == counts[::2] and iterations(deq)[1] == 0
    assert (deq.last.forward.status == Status.CONVERGED).all()
    z0 = torch.ones_like(x)
    assert torch.equal(deq(x, z0=z0, index=numbers(*range(10, 14))), deq(x, z0=z0))


def test_without_an_index_nothing_is_remembered():
    deq, x = problem()
    deq(x)
    deq(x, index=numbers(0, 1, 2, 3))
    assert min(iterations(deq)) > 0


def test_they_follow_the_training():
    deq, x = problem(samples=8)
    optimiser = torch.optim.SGD(deq.parameters(), lr=0.01)
    index, counts = torch.arange(8), []
    for _ in range(4):
        optimiser.zero_grad()
        deq(x, index=index).square().sum().backward()
        optimiser.step()
        counts.append(deq.last.forward.iterations)
    assert all((later <= counts[0]).all() for later in counts[1:])
    assert counts[-1].sum() < 0.9 * counts[0].sum()


def test_a_place_has_one_sample_the_last():
    deq, x = problem(size=2)
    deq(x, index=numbers(0, 2, 1, 4))  # 0, 2 and 4 share a place
    deq(x, index=numbers(0, 2, 1, 4))
    assert [k > 0 for k in iterations(deq)] == [True, True, False, False]
    deq(x, index=numbers(6, 6, 6, 6))  # of one number many times, the last
    deq(x[[3, 0]], index=numbers(6, 1))
    assert iterations(deq)[0] == 0
    assert [len(t) for t in deq.warm_start._z._values] == [2]


def test_a_sample_that_came_to_nothing_is_forgotten():
    def f(z, x):
        return 0.5 * z + x

    x = torch.ones(3, 2, dtype=DOUBLE)
    deq = DEQ(f, solver=Picard(batch_ndim=1, on_failure="ignore"), warm_start=WarmStart(3))
    index = torch.arange(3)
    deq(x, index=index)
    bad = x.clone()
    bad[1] = math.nan
    deq(bad, index=index)
    assert deq.last.forward.status.tolist() == [0, Status.NON_FINITE, 0]
    deq(x, index=index)
    assert [k > 0 for k in iterations(deq)] == [False, True, False]


def test_the_best_iterate_of_an_unfinished_one_is_kept():
    solver = Picard(batch_ndim=1, rtol=1e-6, maxiter=5, on_failure="ignore")
    deq = DEQ(lambda z, x: 0.5 * z + x, solver=solver, warm_start=WarmStart(1))
    residuals = []
    for _ in range(3):
        deq(torch.ones(1, 2), index=numbers(0))
        residuals.append(deq.last.forward.residual_norm.item())
    assert all(later < earlier / 30 for earlier, later in itertools.pairwise(residuals))


def test_several_scales_and_samples_of_one_system():
    def f(z, x):
        return {"a": 0.5 * z["a"].sin() + x, "b": 0.3 * z["b"] + x.sum(1)}

    x = torch.rand(3, 2, dtype=DOUBLE)
    z0 = {"a": torch.zeros(3, 2, dtype=DOUBLE), "b": torch.zeros(3, dtype=DOUBLE)}
    deq = DEQ(f, solver=Anderson(rtol=1e-8), gradient=JFB(), warm_start=WarmStart(3))
    deq(x, z0=z0, index=torch.arange(3))
    deq(x.flip(0), z0=z0, index=numbers(2, 1, 0))
    assert deq.last.forward.iterations == 0


def test_unrolled_iterations_start_there_too():
    deq = DEQ(lambda z, x: 0.5 * z + x, gradient=Unrolled(20), warm_start=WarmStart(2))
    x = torch.ones(2, 1, dtype=DOUBLE)
    deq(x, index=torch.arange(2))
    before = deq.last.forward.residual_norm
    deq(x, index=torch.arange(2))
    assert (deq.last.forward.residual_norm < 1e-5 * before).all()


def test_it_is_no_part_of_the_state_and_not_copied():
    deq, x = problem()
    index = torch.arange(4)
    deq(x, index=index)
    assert set(deq.state_dict()) == {f"layer.{name}" for name in deq.layer.state_dict()}
    for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert other.warm_start.size == 8 and other.warm_start is not deq.warm_start
        other(x, index=index)
        assert min(iterations(other)) > 0
    deq(x, index=index)
    assert iterations(deq) == [0] * 4
    deq.warm_start.clear()
    deq(x, index=index)
    assert min(iterations(deq)) > 0


def test_it_follows_the_dtype():
    deq, x = problem()
    index = torch.arange(4)
    deq(x, index=index)
    deq.float().solver = Anderson(batch_ndim=1, rtol=1e-5)
    assert deq(x.float(), index=index).dtype is torch.float32
    assert iterations(deq) == [0] * 4


def test_in_and_out_of_inference_mode():
    deq, x = problem(adjoint=True)
    index = torch.arange(4)
    with torch.inference_mode():
        deq(x, index=index)
    deq(2 * x, index=index).sum().backward()
    with torch.inference_mode():
        deq.float()(x.float(), index=index)
    deq.double()(x, index=index).sum().backward()
    with torch.no_grad():
        deq(x, index=index)
    assert iterations(deq) == [0] * 4


@pytest.mark.gpu
def test_it_follows_the_device():
    deq, x = problem(adjoint=True)
    index = torch.arange(4)
    deq(x, index=index).sum().backward()
    deq.cuda()
    z = deq(x.cuda(), index=index)
    z.sum().backward()
    assert z.is_cuda and max(iterations(deq)) <= 1
    assert (deq.last.backward.iterations <= 1).all()


batches = st.lists(
    st.tuples(st.integers(-9, 9), st.sampled_from([0, 1, Status.DIVERGED])), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=100)
@given(size=st.integers(1, 5), stored=st.lists(batches, max_size=5), asked=batches)
def test_places_are_those_of_a_dictionary(size, stored, asked):
    warm, places = WarmStart(size), {}
    value = 0.0
    for batch in stored:
        index = torch.tensor([number for number, _ in batch])
        status = torch.tensor([code for _, code in batch], dtype=torch.int32)
        z = torch.arange(value, value + len(batch))[:, None]
        _, starts = warm.starts(index, torch.zeros_like(z))
        starts.keep(Solution(z, status, status, status.double(), "Picard"))
        for (number, code), own in zip(batch, z[:, 0].tolist(), strict=True):
            places[number % size] = (number, own) if code != Status.DIVERGED else None
        value += len(batch)
    index = torch.tensor([number for number, _ in asked])
    got, _ = warm.starts(index, torch.full((len(asked), 1), -1.0))
    known = [places.get(number % size) for number, _ in asked]
    expected = [
        own[1] if own is not None and own[0] == number else -1.0
        for own, (number, _) in zip(known, asked, strict=True)
    ]
    assert got[:, 0].tolist() == expected


# -- the adjoint -----------------------------------------------------------------------------------


def gradients(deq, z):
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
    return torch.autograd.grad((weight * z).sum(), list(deq.parameters()))


@pytest.mark.parametrize(
    "gradient", [GRADIENT, SHINE(GMRES(batch_ndim=1, rtol=1e-10))], ids=["implicit", "shine"]
)
def test_backward_solves_start_where_they_ended(gradient):
    deq, x = problem(adjoint=True)
    deq.gradient = gradient
    if isinstance(gradient, SHINE):
        deq.solver = Broyden(batch_ndim=1, rtol=1e-10, maxiter=100, memory=100)
    expected = gradients(deq, deq(x))
    index = torch.arange(4)
    first = gradients(deq, deq(x, index=index))
    assert (deq.last.backward.iterations > 2).all()
    second = gradients(deq, deq(x, index=index))
    assert (deq.last.backward.iterations == 0).all()
    for some in (first, second):
        for got, right in zip(some, expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-8, atol=1e-8)


def test_a_new_sample_among_known_ones_has_no_guess():
    deq, x = problem(adjoint=True)
    gradients(deq, deq(x, index=torch.arange(4)))
    z = deq(x, index=numbers(0, 1, 2, 5))
    got = gradients(deq, z)
    assert [k > 0 for k in deq.last.backward.iterations.tolist()] == [False] * 3 + [True]
    for a, b in zip(got, gradients(deq, deq(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_second_derivatives_and_transforms_with_it():
    deq, x = problem(adjoint=True)
    index = torch.arange(4)
    x.requires_grad_()
    expected = torch.autograd.functional.hessian(lambda x: deq(x).sum(), x)
    got = torch.autograd.functional.hessian(lambda x: deq(x, index=index).sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    # What is remembered is the adjoint's solution, not that of another of these systems.
    (gradient,) = torch.autograd.grad(deq(x, index=index).sum(), x)
    assert (deq.last.backward.iterations <= 1).all()
    torch.testing.assert_close(gradient, torch.autograd.grad(deq(x).sum(), x)[0])
    jacobian = torch.func.jacrev(lambda x: deq(x, index=index))(x.detach())
    torch.testing.assert_close(jacobian, torch.func.jacrev(deq)(x.detach()), rtol=1e-7, atol=1e-7)


# -- misuse ----------------------------------------------------------------------------------------


def test_misuse():
    deq, x = problem()
    with pytest.raises(ValueError, match=r"DEQ\(layer, warm_start=WarmStart"):
        DEQ(deq.layer)(x, index=torch.arange(4))
    with pytest.raises(TypeError, match=r"tensor of integers .* not tensor of torch.float32"):
        deq(x, index=torch.ones(4))
    with pytest.raises(TypeError, match=r"tensor of integers .* not list"):
        deq(x, index=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"index has shape \(3,\).* shape \(4, 5\)"):
        deq(x, index=torch.arange(3))
    deq(x, index=torch.arange(4))
    with pytest.raises(ValueError, match=r"samples of shape \[\(5,\)\], these have \[\(2, 5\)\]"):
        deq(torch.zeros(4, 2, 5, dtype=DOUBLE), index=torch.arange(4))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WarmStart(0), ValueError, "size must be at least 1"),
        (lambda: WarmStart(1.5), TypeError, "size must be an int"),
        (lambda: WarmStart(1, adjoint=1), TypeError, "adjoint must be a bool"),
        (lambda: DEQ(torch.sin, warm_start=3), TypeError, "warm_start must be a"),
        (
            lambda: DEQ(torch.sin, gradient=JFB(), warm_start=WarmStart(1, adjoint=True)),
            TypeError,
            "an iterative solver",
        ),
    ],
)
def test_misuse_at_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()
