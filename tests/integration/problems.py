"""Hypergradients in float64, each written once for both libraries, which share their names."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torch.func import functional_call, grad

import tritonimplicit

LIBRARIES = {"TorchOpt": torchopt, "tritonimplicit": tritonimplicit}
F64 = torch.float64
TORCH_WARNINGS = [
    pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning"),  # in TorchOpt
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # in torch.func.jacfwd
]


def make_solver(library: ModuleType, name: str) -> Any:
    """A solver to 1e-12: the Neumann series' remainder is below it on all the problems here."""
    solvers = library.linear_solve
    if name == "cg":
        return solvers.solve_cg(rtol=1e-12)
    if name == "normal_cg":
        return solvers.solve_normal_cg(rtol=1e-12)
    if name == "neumann":
        return solvers.solve_inv(ns=True, maxiter=200, alpha=0.4)
    return solvers.solve_inv()


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


# --- Ridge regression -----------------------------------------------------------------------------

RIDGE_X, RIDGE_Y = numbers(0, 40, 6), numbers(1, 40)


def ridge_objective(w: Tensor, reg: Tensor) -> Tensor:
    return 0.5 * (RIDGE_X @ w - RIDGE_Y).square().mean() + 0.5 * reg * w.square().sum()


def ridge_solution(reg: Tensor) -> Tensor:
    system = RIDGE_X.T @ RIDGE_X / 40 + reg * torch.eye(6, dtype=F64)
    return torch.linalg.solve(system, RIDGE_X.T @ RIDGE_Y / 40)


def ridge_reg() -> Tensor:
    return torch.tensor(0.3, dtype=F64, requires_grad=True)


def ridge_closed_form() -> Tensor:
    reg = ridge_reg()
    return flat(torch.autograd.grad(ridge_solution(reg).sin().sum(), reg))


def ridge_function(library: ModuleType, solve: Any) -> Tensor:
    root = library.diff.implicit.custom_root(grad(ridge_objective), argnums=1, solve=solve)
    reg = ridge_reg()
    w = root(lambda init, reg: ridge_solution(reg))(torch.zeros(6, dtype=F64), reg)
    return flat(torch.autograd.grad(w.sin().sum(), reg))


def ridge_module(library: ModuleType, solve: Any) -> Tensor:
    class Ridge(library.nn.ImplicitMetaGradientModule, linear_solve=solve):
        def __init__(self, reg):
            super().__init__()
            self.reg = reg
            self.w = nn.Parameter(torch.zeros(6, dtype=F64))

        def objective(self):
            return ridge_objective(self.w, self.reg)

        def solve(self):
            self.w.copy_(ridge_solution(self.reg))
            return self

    reg = ridge_reg()
    return flat(torch.autograd.grad(Ridge(reg).solve().w.sin().sum(), reg))


# --- iMAML: a classifier, held near its meta-parameters, adapted by gradient descent --------------

TRAIN_X, TRAIN_Y = numbers(2, 24, 4), torch.arange(24) % 3
TEST_X, TEST_Y = numbers(3, 24, 4), torch.arange(24) % 3


def make_net(bias: bool) -> nn.Linear:
    net = nn.Linear(4, 3, bias=bias, dtype=F64)
    with torch.no_grad():
        for seed, p in enumerate(net.parameters()):
            p.copy_(numbers(seed, *p.shape))
    return net


def penalty(params: Any, meta: Any) -> Any:
    return 0.5 * sum((p - m).square().sum() for p, m in zip(params, meta, strict=True))


def imaml_function(library: ModuleType, solve: Any, bias: bool = True) -> Tensor:
    net = make_net(bias)
    names = [name for name, _ in net.named_parameters()]

    def loss(params, x, y):
        named = dict(zip(names, params, strict=True))
        return F.cross_entropy(functional_call(net, named, (x,)), y)

    def objective(params, meta):
        return loss(params, TRAIN_X, TRAIN_Y) + penalty(params, meta)

    @library.diff.implicit.custom_root(grad(objective), argnums=1, solve=solve)
    def adapt(params, meta):
        for _ in range(80):  # the Hessian's eigenvalues lie in [1, 2.5]: the error halves each time
            gradient = grad(objective)(params, meta)
            params = tuple(p - 0.5 * g for p, g in zip(params, gradient, strict=True))
        return params

    meta = tuple(net.parameters())
    adapted = adapt(tuple(m.detach() for m in meta), meta)
    return flat(torch.autograd.grad(loss(adapted, TEST_X, TEST_Y), meta))


def imaml_module(library: ModuleType, solve: Any, bias: bool = True) -> Tensor:
    class Adapted(library.nn.ImplicitMetaGradientModule, linear_solve=solve):
        def __init__(self, meta_net):
            super().__init__()
            self.meta_net = meta_net
            self.net = library.module_clone(meta_net, by="deepcopy", detach_buffers=True)

        def objective(self, x, y):
            return F.cross_entropy(self.net(x), y) + penalty(
                self.parameters(), self.meta_parameters()
            )

        def solve(self, x, y):
            params = tuple(self.parameters())
            optimizer = library.SGD(params, lr=0.5)
            with torch.enable_grad():
                for _ in range(80):
                    optimizer.zero_grad()
                    self.objective(x, y).backward(inputs=params)
                    optimizer.step()
            return self

    net = make_net(bias)
    adapted = Adapted(net).solve(TRAIN_X, TRAIN_Y)
    outer = F.cross_entropy(adapted.net(TEST_X), TEST_Y)
    return flat(torch.autograd.grad(outer, tuple(net.parameters())))


# --- A fixed point, whose matrix is not symmetric -------------------------------------------------

COUPLING = 0.15 * numbers(4, 5, 5)


def equilibrium(library: ModuleType, solve: Any) -> Tensor:
    def residual(z, x):
        return z - torch.tanh(COUPLING @ z + x)

    @library.diff.implicit.custom_root(residual, argnums=1, solve=solve)
    def iterate(z, x):
        for _ in range(100):
            z = torch.tanh(COUPLING @ z + x)
        return z

    x = numbers(5, 5).requires_grad_()
    z = iterate(torch.zeros(5, dtype=F64), x)
    return flat(torch.autograd.grad(z.sin().sum(), x))
