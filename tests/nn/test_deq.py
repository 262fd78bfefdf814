"""`nn.DEQ`: one evaluation of a layer at its fixed point, to autograd and to the layer."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

import tritonimplicit as ti
from tritonimplicit import Status
from tritonimplicit.fixed_point import Anderson, Picard
from tritonimplicit.linear_solve import GMRES, Neumann
from tritonimplicit.nn import DEQ, Implicit, Unrolled

DOUBLE = torch.float64
TIGHT = Anderson(batch_ndim=1, rtol=1e-13, maxiter=200)
EXACT = Implicit(GMRES(batch_ndim=1, rtol=1e-13))
WHOLE = Anderson(rtol=1e-13, maxiter=200)
EXACT_WHOLE = Implicit(GMRES(rtol=1e-13))


class Cell(nn.Module):
    """tanh(W z + U x) / 2: a contraction while ‖W‖ < 2."""

    def __init__(self, n=5, extra=None):
        super().__init__()
        self.w = nn.Linear(n, n, bias=False)
        self.u = nn.Linear(n, n)
        self.extra = extra

    def forward(self, z, x):
        h = self.w(z) + self.u(x)
        return 0.5 * torch.tanh(h if self.extra is None else self.extra(h))


def problem(extra=None, samples=3, n=5):
    torch.manual_seed(0)
    cell = Cell(n, extra).to(DOUBLE)
    return cell, torch.randn(samples, n, dtype=DOUBLE)


def unrolled(f, z, steps=200):
    for _ in range(steps):
        z = f(z)
    return z


def gradients(z, *tensors):
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
    return torch.autograd.grad((weight * z).sum() + z.square().sum(), tensors)


def assert_same(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- the layer's function --------------------------------------------------------------------------


def test_parameters_and_input_get_the_gradient_of_the_unrolled_iteration():
    cell, x = problem()
    x.requires_grad_()
    wanted = (x, *cell.parameters())
    z = DEQ(cell, solver=TIGHT, gradient=EXACT)(x)
    expected = unrolled(lambda z: cell(z, x), torch.zeros_like(x))
    assert_same([z], [expected])
    assert_same(gradients(z, *wanted), gradients(expected, *wanted))


def test_defaults_meet_their_tolerance():
    cell, x = problem()
    deq = DEQ(cell)
    z = deq(x)
    residual = (cell(z, x) - z).norm(dim=1)
    assert (residual <= 1e-3 * cell(z, x).norm(dim=1)).all()
    got = gradients(z, *cell.parameters())
    z = unrolled(lambda z: cell(z, x), torch.zeros_like(x))
    for a, b in zip(got, gradients(z, *cell.parameters()), strict=True):
        # ‖J‖ < 1/2: the solutions' errors are below twice the residuals, and so on through J.
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_more_arguments():
    scale = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    bias = torch.ones(2, 4, dtype=DOUBLE, requires_grad=True)
    deq = DEQ(lambda z, x, s, extra: s * z.sin() + x + extra["b"], solver=TIGHT, gradient=EXACT)
    x = torch.randn(2, 4, dtype=DOUBLE)
    z = deq(x, scale, {"b": bias, "name": "no tensor"})
    expected = unrolled(lambda z: scale * z.sin() + x + bias, torch.zeros_like(x))
    assert_same(gradients(z, scale, bias), gradients(expected, scale, bias))


class TwoScales(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(3, 3, 3, padding=1)
        self.down, self.up = nn.Conv1d(2, 3, 1), nn.Conv1d(3, 2, 1)

    def forward(self, z, x):
        fine, coarse = z["fine"], z["coarse"]
        down = self.down(nn.functional.avg_pool1d(fine, 2))
        up = self.up(coarse.repeat_interleave(2, dim=-1))
        return {
            "fine": 0.3 * torch.tanh(self.fine(fine) + up + x),
            "coarse": 0.3 * torch.tanh(self.coarse(coarse) + down),
        }


def test_a_multiscale_state():
    torch.manual_seed(0)
    layer = TwoScales().to(DOUBLE)
    x = torch.randn(3, 2, 8, dtype=DOUBLE)
    z0 = {"fine": torch.zeros_like(x), "coarse": x.new_zeros(3, 3, 4)}
    deq = DEQ(layer, solver=TIGHT, gradient=EXACT)
    got, expected = deq(x, z0=z0), unrolled(lambda z: layer(z, x), z0)
    wanted = tuple(layer.parameters())
    assert_same(
        torch.autograd.grad(got["fine"].sum() + got["coarse"].square().sum(), wanted),
        torch.autograd.grad(expected["fine"].sum() + expected["coarse"].square().sum(), wanted),
    )


# -- what the layer does to itself -----------------------------------------------------------------


def test_batch_norm_counts_one_batch_at_the_fixed_point():
    cell, x = problem(nn.BatchNorm1d(5), samples=6)
    reference = copy.deepcopy(cell)
    deq = DEQ(cell, solver=WHOLE, gradient=EXACT_WHOLE)
    z = deq(x)
    reference(z.detach(), x)
    assert cell.extra.num_batches_tracked == 1
    torch.testing.assert_close(cell.extra.running_mean, reference.extra.running_mean)
    torch.testing.assert_close(cell.extra.running_var, reference.extra.running_var)
    before = copy.deepcopy(cell.state_dict())
    wanted = tuple(cell.parameters())
    got = gradients(z, *wanted)
    assert all(torch.equal(t, before[name]) for name, t in cell.state_dict().items())
    expected = unrolled(lambda z: reference(z, x), torch.zeros_like(x))
    assert_same(got, gradients(expected, *reference.parameters()), 1e-8)


def test_batch_norm_in_evaluation():
    cell, x = problem(nn.BatchNorm1d(5))
    cell(torch.zeros_like(x), x)
    cell.eval()
    before = copy.deepcopy(cell.state_dict())
    wanted = tuple(cell.parameters())
    deq = DEQ(cell, solver=TIGHT, gradient=EXACT).eval()
    got = gradients(deq(x), *wanted)
    assert all(torch.equal(t, before[name]) for name, t in cell.state_dict().items())
    expected = unrolled(lambda z: cell(z, x), torch.zeros_like(x))
    assert_same(got, gradients(expected, *wanted))


def test_two_forward_passes_before_a_backward_pass():
    cell, x = problem(nn.BatchNorm1d(5), samples=6)
    reference = copy.deepcopy(cell)
    deq = DEQ(cell, solver=WHOLE, gradient=EXACT_WHOLE)
    got = gradients(torch.stack([deq(x), deq(2 * x)]), *cell.parameters())
    assert cell.extra.num_batches_tracked == 2
    both = [unrolled(lambda z, y=y: reference(z, y), torch.zeros_like(x)) for y in (x, 2 * x)]
    assert_same(got, gradients(torch.stack(both), *reference.parameters()), 1e-8)


def test_dropout_draws_one_mask_as_one_evaluation_does():
    cell, x = problem(nn.Dropout(0.5))
    deq = DEQ(cell, solver=TIGHT, gradient=EXACT)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    z = deq(x)
    after = torch.get_rng_state()
    got = gradients(z, *cell.parameters())
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(state)
    cell(z.detach(), x)
    assert torch.equal(torch.get_rng_state(), after)

    def fixed(z):
        torch.set_rng_state(state)
        return cell(z, x)

    expected = unrolled(fixed, torch.zeros_like(x))
    assert_same([z], [expected])
    assert_same(got, gradients(expected, *cell.parameters()))
    assert not torch.equal(z, deq(x))  # another mask


@pytest.mark.gpu
def test_dropout_on_a_gpu_draws_one_mask():
    cell, x = problem(nn.Dropout(0.5))
    cell, x = cell.cuda(), x.cuda()
    deq = DEQ(cell, solver=TIGHT, gradient=EXACT)
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    z = deq(x)
    after = torch.cuda.get_rng_state()
    got = gradients(z, *cell.parameters())

    def fixed(z):
        torch.cuda.set_rng_state(state)
        return cell(z, x)

    expected = unrolled(fixed, torch.zeros_like(x))
    assert torch.equal(torch.cuda.get_rng_state(), after)
    assert_same([z], [expected])
    assert_same(got, gradients(expected, *cell.parameters()))


def test_spectral_norm_does_one_power_iteration():
    cell, x = problem()
    nn.utils.parametrizations.spectral_norm(cell.w)
    reference = copy.deepcopy(cell)
    z = DEQ(cell, solver=TIGHT, gradient=EXACT)(x)
    got = gradients(z, *cell.parameters())
    start = copy.deepcopy(dict(reference.named_buffers()))
    reference(z.detach(), x)
    for name, buffer in reference.named_buffers():
        assert torch.equal(cell.get_buffer(name), buffer) and not torch.equal(buffer, start[name])

    def fixed(z):
        own = {name: buffer.clone() for name, buffer in start.items()}
        return functional_call(reference, own, (z, x))

    expected = unrolled(fixed, torch.zeros_like(x))
    assert_same(got, gradients(expected, *reference.parameters()))


def test_a_layer_that_changes_its_mode_before_the_backward_pass_is_an_error():
    cell, x = problem(nn.Dropout(0.5))
    deq = DEQ(cell)
    z = deq(x)
    deq.eval()
    with pytest.raises(RuntimeError, match=r"from train\(\) to eval\(\)"):
        z.sum().backward()


# -- transforms ------------------------------------------------------------------------------------


# Forward-mode AD itself calls torch.jit.script.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@forward_mode
def test_second_derivatives():
    cell, x = problem(samples=2, n=3)
    deq = DEQ(cell, solver=TIGHT, gradient=EXACT)
    x.requires_grad_()
    weight = cell.w.weight.detach().clone().requires_grad_()

    def run(x, weight):
        return functional_call(deq, {"layer.w.weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, weight))


@forward_mode
def test_torch_func():
    cell, x = problem()
    deq = DEQ(cell, solver=TIGHT, gradient=EXACT)
    parameters = dict(deq.named_parameters())
    loss = lambda p: functional_call(deq, p, (x,)).square().sum()  # noqa: E731
    got = torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()})
    expected = torch.autograd.grad(deq(x).square().sum(), list(parameters.values()))
    assert_same(got.values(), expected)
    jacobian = torch.func.jacrev(deq)(x)
    assert_same([jacobian], [torch.func.jacfwd(deq)(x)])
    assert_same([jacobian], [torch.autograd.functional.jacobian(deq, x)])


def test_a_vmapped_forward_pass_is_an_error_that_says_what_to_do():
    cell, x = problem()
    with pytest.raises(RuntimeError, match="In the place of vmap, give a batch"):
        torch.func.vmap(DEQ(cell))(x[:, None])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_a_checkpoint(use_reentrant):
    cell, x = problem(nn.Dropout(0.5))
    x.requires_grad_()
    deq = DEQ(cell, solver=TIGHT, gradient=EXACT)
    torch.manual_seed(0)
    expected = gradients(deq(x), *cell.parameters())
    torch.manual_seed(0)
    z = torch.utils.checkpoint.checkpoint(deq, x, use_reentrant=use_reentrant)
    z = (torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape) * z).sum() + z.square().sum()
    z.backward()
    assert_same([p.grad for p in cell.parameters()], expected)


def test_autocast_rounds_the_layer_and_not_the_state():
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(3, 5)
    deq = DEQ(cell, solver=Anderson(batch_ndim=1, rtol=1e-2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cell(x, x).dtype is torch.bfloat16
        z = deq(x)
    assert z.dtype is torch.float32
    z.square().sum().backward()
    got = torch.cat([p.grad.flatten() for p in cell.parameters()])
    exact = copy.deepcopy(cell).double()
    z = unrolled(lambda z: exact(z, x.double()), torch.zeros(3, 5, dtype=DOUBLE))
    expected = torch.autograd.grad(z.square().sum(), list(exact.parameters()))
    expected = torch.cat([g.flatten() for g in expected])
    # bfloat16 rounds to 2^-8; a few roundings in a row, in z, in J and in the last vjp.
    assert (got - expected).norm() <= 10 * 2**-8 * expected.norm()


# -- starts ----------------------------------------------------------------------------------------


def test_a_warm_start_takes_fewer_iterations_and_gets_no_gradient():
    cell, x = problem()
    deq = DEQ(cell)
    z = deq(x)
    cold = deq.last.forward.iterations
    deq(x + 1e-4, z0=z)
    assert (deq.last.forward.iterations < cold).all()
    start = torch.zeros_like(x, requires_grad=True)
    assert torch.autograd.grad(deq(x, z0=start).sum(), start, allow_unused=True) == (None,)


def test_a_start_has_to_be_given_where_z_does_not_look_like_x():
    layer = nn.Module()
    layer.w = nn.Linear(3, 7)
    layer.forward = lambda z, x: 0.1 * z + layer.w(x)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"zeros like x, of shape \(2, 3\).*z0="):
        DEQ(layer)(x)
    assert DEQ(layer)(x, z0=torch.zeros(2, 7)).shape == (2, 7)
    embed = lambda z, x: 0.1 * z + nn.functional.one_hot(x, 4)  # noqa: E731
    with pytest.raises(TypeError, match=r"x, a tensor of dtype torch.int64.*z0="):
        DEQ(embed)(torch.arange(4))
    assert DEQ(embed)(torch.arange(4), z0=torch.zeros(4, 4)).argmax(1).tolist() == [0, 1, 2, 3]
    with pytest.raises(TypeError, match=r"x, a dict.*z0="):
        DEQ(embed)({})
    with pytest.raises(RuntimeError, match="must match"):  # the layer's own error
        DEQ(lambda z, x: z[:, :2] + x)(x, z0=torch.zeros(2, 3))


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled(3)])
def test_an_empty_batch_is_named(gradient):
    with pytest.raises(ValueError, match=r"the batch is empty: x has shape \(0, 4\)"):
        DEQ(nn.Linear(4, 4), gradient=gradient)(torch.zeros(0, 4))


# -- what became of it -----------------------------------------------------------------------------


def test_the_last_pass():
    cell, x = problem()
    deq = DEQ(cell)
    assert deq.last.forward is None
    with pytest.raises(RuntimeError, match="no forward pass"):
        deq.last.spectral_radius()
    z = deq(x)
    forward = deq.last.forward
    assert torch.equal(forward.value, z) and (forward.status == Status.CONVERGED).all()
    torch.testing.assert_close(forward.residual_norm, (cell(z, x) - z).norm(dim=1))
    assert deq.last.backward is None
    z.sum().backward()
    backward = deq.last.backward
    assert backward.solver == "GMRES" and (backward.status == Status.CONVERGED).all()
    assert (backward.residual_norm <= 1e-3 * 5**0.5).all()  # dl/dz is all ones
    jacobians = torch.func.vmap(torch.func.jacrev(cell))(z.detach(), x)
    expected = torch.linalg.eigvals(jacobians).abs().amax(1)
    got = deq.last.spectral_radius(steps=400)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0)


def test_failures_are_reported():
    deq = DEQ(lambda z, x: z + x)
    with pytest.warns(ti.ConvergenceWarning, match=r"Anderson: some of 2 systems"):
        deq(torch.ones(2, 3))
    assert (deq.last.forward.status != Status.CONVERGED).all()
    deq = DEQ(lambda z, x: z + x, solver=Picard(batch_ndim=1, on_failure="raise", maxiter=0))
    with pytest.raises(ti.ConvergenceError):
        deq(torch.ones(2, 3))
    stopped = Implicit(GMRES(batch_ndim=1, maxiter=2, on_failure="raise"))
    deq = DEQ(lambda z, x: x * z.sin() + 1, gradient=stopped)
    x = torch.linspace(0.1, 0.9, 6).view(2, 3).requires_grad_()
    deq(x).sum().backward()  # a maxiter that was asked for is no failure
    assert (deq.last.backward.iterations == 2).all()


def test_warnings_name_the_last_pass():
    with pytest.warns(ti.ConvergenceWarning, match=r"`deq.last.forward` tells the status"):
        DEQ(lambda z, x: z + x)(torch.ones(2, 3))
    rotation = torch.tensor([[0.0, 3.0], [-3.0, 0.0]])
    x = torch.ones(2, 2, requires_grad=True)
    gradient = Implicit(Neumann(batch_ndim=1, maxiter=5))
    z = DEQ(lambda z, x: z @ rotation + x, gradient=gradient)(x)
    with pytest.warns(ti.ConvergenceWarning, match=r"`deq.last.backward` tells the status"):
        z.sum().backward()


def test_a_pass_that_raises_is_told_of_all_the_same():
    deq = DEQ(lambda z, x: z + x, solver=Picard(batch_ndim=1, on_failure="raise"))
    with pytest.raises(ti.ConvergenceError):
        deq(torch.ones(2, 3))
    assert (deq.last.forward.status == Status.MAX_ITERATIONS).all()


def test_a_z_without_a_batch_is_told_what_to_do():
    cell, _ = problem()
    z0 = torch.arange(5, dtype=DOUBLE)
    mixing = DEQ(lambda z, x: 3 * z.roll(1) + x, solver=Picard(batch_ndim=1))
    with pytest.warns(ti.ConvergenceWarning, match=r"a z without a batch\), and need fewer"):
        mixing(z0)
    z = DEQ(cell, solver=WHOLE, gradient=EXACT_WHOLE)(z0)
    assert_same([z], [unrolled(lambda z: cell(z, z0), torch.zeros_like(z0))])


def test_what_the_caller_does_to_z_does_not_change_the_last_pass():
    cell, x = problem()
    deq = DEQ(cell)
    with torch.no_grad():
        z = deq(x)
        before, radius = z.clone(), deq.last.spectral_radius()
        z.mul_(2)
    assert torch.equal(deq.last.forward.value, before)
    assert torch.equal(deq.last.spectral_radius(), radius)


def test_a_parameter_in_a_closure_is_warned_of():
    w = torch.tensor(0.5, requires_grad=True)
    deq = DEQ(lambda z, x: 0.5 * w * z + x)
    with pytest.warns(UserWarning, match=r"^the layer of a DEQ uses 1 .* deq\(x, w\), or"):
        deq(torch.ones(2, 3))


# -- a module like any other -----------------------------------------------------------------------


def test_its_parameters_are_the_layers():
    cell, _ = problem()
    deq = DEQ(cell)
    assert list(deq.state_dict()) == [f"layer.{name}" for name in cell.state_dict()]
    other = DEQ(Cell().double())
    other.load_state_dict(deq.state_dict())
    assert torch.equal(other.layer.w.weight, cell.w.weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate):
    cell, x = problem()
    deq = DEQ(cell, solver=TIGHT, gradient=EXACT)
    z = deq(x)
    z.sum().backward()
    other = duplicate(deq)
    assert other.last.forward is None and deq.last.forward is not None
    assert other.solver == deq.solver
    assert torch.equal(other(x), z)
    assert other.layer is not cell


def test_dtype_and_mode_follow():
    deq = DEQ(Cell(extra=nn.Dropout(0.5))).to(torch.bfloat16).eval()
    assert not deq.layer.extra.training
    x = torch.randn(2, 5, dtype=torch.bfloat16)
    assert deq(x).dtype is torch.bfloat16
    assert torch.equal(deq(x), deq(x))


def test_tied_and_frozen_parameters():
    cell, x = problem()
    cell.u.weight = cell.w.weight
    cell.u.bias.requires_grad_(False)
    expected = unrolled(lambda z: cell(z, x), torch.zeros_like(x))
    z = DEQ(cell, solver=TIGHT, gradient=EXACT)(x)
    assert_same(gradients(z, cell.w.weight), gradients(expected, cell.w.weight))


def test_training_with_an_optimiser():
    cell, x = problem(samples=16)
    deq = DEQ(cell)
    target = 0.2 * torch.randn(16, 5, dtype=DOUBLE)
    optimiser = torch.optim.Adam(deq.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = (deq(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_without_grad_nothing_is_recorded():
    cell, x = problem()
    with torch.no_grad():
        assert not DEQ(cell)(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(DEQ(cell)(x), DEQ(cell)(x))


def test_a_graph_frees_its_memory_without_the_garbage_collector():
    cell, x = problem()
    x.requires_grad_()
    deq = DEQ(cell)
    gc.collect()
    gc.disable()
    try:
        z = deq(2 * x)
        z.sum().backward(retain_graph=True)
        node = weakref.ref(z.grad_fn)
        del z
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DEQ(3), "layer must be a function"),
        (lambda: DEQ(nn.Identity(), solver="anderson"), "solver must be one of"),
        (lambda: DEQ(nn.Identity(), solver=GMRES()), "solver must be one of"),
        (lambda: DEQ(nn.Identity(), gradient="ift"), "gradient must be one of"),
        (lambda: DEQ(nn.Identity(), gradient=Implicit), "gradient must be one of"),
        (lambda: Implicit(solve="gmres"), "solve must be a function"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(TypeError, match=message):
        make()
