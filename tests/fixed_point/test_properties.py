"""What a solver of fixed points says is true, on any map: checked outside, in float64."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonimplicit import Status
from tritonimplicit.fixed_point import Anderson, Broyden, Picard

solvers = st.sampled_from(
    [Picard(), Anderson(), Anderson(m=2, beta=0.5), Broyden(), Broyden(update="bad", memory=4)]
)


@settings(deadline=None, max_examples=150)
@given(
    solver=solvers,
    samples=st.integers(1, 4),
    n=st.integers(1, 20),
    size=st.floats(0.0, 4.0),
    rtol=st.sampled_from([1e-2, 1e-4, 1e-7]),
    maxiter=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_status_and_residual_are_true(solver, samples, n, size, rtol, maxiter, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = size * torch.randn(samples, n, n, generator=generator, dtype=dtype) / n**0.5
    b = torch.randn(samples, n, generator=generator, dtype=dtype)

    def f(z, m=matrix, b=b):
        return torch.tanh((m @ z[..., None])[..., 0]) + b

    solver = dataclasses.replace(solver, rtol=rtol, maxiter=maxiter, batch_ndim=1)
    solution = solver.solve(f, torch.zeros_like(b))
    z = solution.value.double()
    image = f(z, matrix.double(), b.double())
    residual, image_norm = (image - z).norm(dim=1), image.norm(dim=1)
    # f in its own precision: n + 3 roundings of the product, one each of tanh and of the sum.
    eps = torch.finfo(dtype).eps
    rounding = eps * ((n + 3) * (matrix.double().abs() @ z.abs()[..., None])[..., 0] + 4)
    slack = rounding.norm(dim=1) + eps * image_norm
    assert ((solution.residual_norm - residual).abs() <= slack).all()
    tolerance = max(rtol, eps) * image_norm
    converged = solution.status == Status.CONVERGED
    assert (residual[converged] <= (tolerance + slack)[converged]).all()
    rest = ~converged
    assert (solution.status[rest] == Status.MAX_ITERATIONS).all()
    assert (residual[rest] >= (tolerance - slack)[rest]).all()
    assert (solution.iterations[rest] == maxiter).all()
