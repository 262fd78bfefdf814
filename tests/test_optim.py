"""optim: sgd and SGD against torch.optim.SGD, apply_updates, and the modes of module_clone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tritonimplicit import SGD, apply_updates, module_clone, sgd
from tritonimplicit.nn import ImplicitMetaGradientModule


def make_params() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in (("weight", (3, 2)), ("bias", (3,)))
    }


def loss(params) -> torch.Tensor:
    return (params["weight"].sum(1) * params["bias"]).cos().sum()


SETTINGS = [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_sgd_steps_as_torchs(settings, inplace):
    expected = make_params()
    reference = torch.optim.SGD(expected.values(), lr=0.1, **settings)
    params = make_params()
    optimizer = sgd(0.1, **settings)
    state = optimizer.init(params)
    for _ in range(4):
        reference.zero_grad()
        loss(expected).backward()
        reference.step()
        grads = torch.autograd.grad(loss(params), params.values())
        grads = dict(zip(params, grads, strict=True))
        updates, state = optimizer.update(grads, state, params=params, inplace=inplace)
        params = apply_updates(params, updates)
    for name, value in params.items():
        # The same operations up to their order: a few roundings a step.
        torch.testing.assert_close(value, expected[name], rtol=1e-14, atol=1e-14)
        assert value.is_leaf
        assert value.requires_grad


@pytest.mark.parametrize("settings", SETTINGS)
def test_sgd_out_of_place_is_differentiable(settings):
    start = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)

    def descend(param):
        optimizer = sgd(0.1, **settings)
        state = optimizer.init(param)
        for _ in range(3):
            (grad,) = torch.autograd.grad(param.cos().sum(), param, create_graph=True)
            updates, state = optimizer.update(grad, state, params=param, inplace=False)
            param = apply_updates(param, updates, inplace=False)
        return param

    assert torch.autograd.gradcheck(descend, start)


def test_class_sgd_has_torchopts_order_of_arguments():
    param = nn.Parameter(torch.zeros(1))
    (group,) = SGD([param], 0.1, 0.9, 0.01, 0.5, False, True).param_groups
    names = ("lr", "momentum", "weight_decay", "dampening", "nesterov", "maximize")
    assert tuple(group[name] for name in names) == (0.1, 0.9, 0.01, 0.5, False, True)
    param.grad = torch.ones(1)
    SGD([param], lr=0.1).step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.1]))


def test_gradients_of_none_stay_none():
    params = {"used": torch.ones(2), "unused": torch.ones(2)}
    grads = {"used": torch.ones(2), "unused": None}
    optimizer = sgd(0.5, momentum=0.9, weight_decay=0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params=params)
    assert updates["unused"] is None
    stepped = apply_updates(params, updates)
    assert stepped["unused"] is params["unused"]
    torch.testing.assert_close(stepped["used"], torch.full((2,), 1 - 0.5 * 1.1))


def test_a_momentum_buffer_outlives_the_gradients():
    optimizer = sgd(0.5, momentum=0.5)
    grad = torch.ones(1)
    _, state = optimizer.update(grad, optimizer.init(torch.zeros(1)))
    grad.zero_()
    updates, _ = optimizer.update(torch.ones(1), state)
    torch.testing.assert_close(updates, torch.tensor([-0.75]))


def test_updates_in_place_are_seen_by_autograd():
    param = torch.ones(2, requires_grad=True)
    squares = param.square().sum()
    apply_updates(param, torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_gradients_that_share_memory():
    a, b = (torch.zeros(2, requires_grad=True) for _ in range(2))
    grads = torch.autograd.grad(((a + b) * torch.ones(2)).sum(), (a, b))
    assert grads[0].data_ptr() == grads[1].data_ptr()
    optimizer = sgd(0.5)
    updates, _ = optimizer.update(grads, optimizer.init((a, b)))
    for update in updates:
        torch.testing.assert_close(update, torch.full((2,), -0.5))


def test_wrong_settings_and_trees():
    for settings in ({"lr": -1.0}, {"lr": 1.0, "momentum": -0.1}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match="must not be negative"):
            sgd(**settings)
    with pytest.raises(TypeError, match="lr must be a number, not a function"):
        sgd(lambda step: 0.1)
    with pytest.raises(ValueError, match="weight decay needs the parameters"):
        sgd(0.1, weight_decay=0.1).update(torch.ones(1), None)
    with pytest.raises(ValueError, match="key mismatch"):
        apply_updates({"a": torch.ones(1)}, {"b": torch.ones(1)})


# --- module_clone ---------------------------------------------------------------------------------


def make_module() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].bias.requires_grad_(False)
    module.tied = module[0].weight
    return module


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
@pytest.mark.parametrize("detach_buffers", [False, True])
def test_module_clone(by, detach_buffers):
    module = make_module()
    clone = module_clone(module, by=by, detach_buffers=detach_buffers)
    assert clone is not module
    assert clone[0] is not module[0]
    assert clone.tied is clone[0].weight
    assert list(clone.state_dict()) == list(module.state_dict())
    for (name, new), old in zip(
        clone.named_parameters(), dict(module.named_parameters()).values(), strict=True
    ):
        assert torch.equal(new, old)
        assert new.requires_grad == old.requires_grad
        assert (new is old) == (by == "reference")
        if by == "deepcopy":
            assert isinstance(new, nn.Parameter)
        if by == "copy" and old.requires_grad:
            (grad,) = torch.autograd.grad(new.sum(), old)
            assert torch.equal(grad, torch.ones_like(old)), name
    for new, old in zip(clone.buffers(), module.buffers(), strict=True):
        assert torch.equal(new, old)
        assert (new is old) == (by == "reference" and not detach_buffers)


def test_module_clone_of_a_pytree_and_a_device():
    tree = {"a": torch.ones(2, requires_grad=True), "b": (nn.Parameter(torch.ones(1)),)}
    for by in ("reference", "copy", "deepcopy"):
        clone = module_clone(tree, by=by)
        assert (clone["a"] is tree["a"]) == (by == "reference")
        assert clone["a"].is_leaf == (by != "copy")
    assert isinstance(clone["b"][0], nn.Parameter)
    moved = module_clone(make_module(), by="deepcopy", device="meta")
    assert {t.device.type for t in moved.state_dict().values()} == {"meta"}
    assert module_clone(tree, device="meta")["a"].device.type == "meta"


class Scaled(ImplicitMetaGradientModule):
    """Minimises |w - scale|^2; `net` is a meta-module with a buffer."""

    def __init__(self, scale: torch.Tensor, net: nn.Module) -> None:
        super().__init__()
        self.scale, self.net = scale, net
        self.w = nn.Parameter(torch.zeros(2))

    def objective(self) -> torch.Tensor:
        return (self.w - self.scale).square().sum()

    def solve(self) -> Scaled:
        self.w.copy_(self.scale)
        return self


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
@pytest.mark.parametrize("solved", [False, True])
def test_module_clone_of_an_implicit_module(by, solved):
    scale = torch.ones(2, requires_grad=True)
    module = Scaled(scale, nn.BatchNorm1d(1))
    if solved:
        module.solve()
    w = module.w
    clone = module_clone(nn.Sequential(module), by=by)[0]
    assert module.w is w
    pairs = zip(
        (clone.scale, *clone.net.parameters(), *clone.net.buffers()),
        (scale, *module.net.parameters(), *module.net.buffers()),
        strict=True,
    )
    for new, old in pairs:
        assert torch.equal(new, old)
        assert (new is old) == (by == "reference")
        assert (new.grad_fn is not None) == (by == "copy" and old.requires_grad)
    assert torch.equal(clone.w, w)
    assert (clone.w.grad_fn is not None) == (by == "copy" or (by == "reference" and solved))
    if solved and by != "deepcopy":
        (gradient,) = torch.autograd.grad(clone.w.sum(), scale)
        torch.testing.assert_close(gradient, torch.ones(2))
    inputs = (clone.scale,) if by == "deepcopy" else (clone.scale, scale)
    for gradient in torch.autograd.grad(clone.solve().w.sum(), inputs):
        torch.testing.assert_close(gradient, torch.ones(2))
    assert module.w is w


def test_module_clone_misuse():
    with pytest.raises(ValueError, match="must be one of 'reference', 'copy', 'deepcopy', not 'x'"):
        module_clone(nn.Linear(1, 1), by="x")
    with pytest.raises(TypeError, match="found a float"):
        module_clone({"a": 1.0})
