"""The four cases of TorchOpt's tutorial on implicit differentiation, written for this library.

Three ways to the same meta-gradient of iMAML (Rajeswaran et al. 2019): gradient descent adapts a
linear model to data, held near meta-parameters by a quadratic penalty; how does the mean prediction
of the adapted model depend on the meta-parameters? Then a fixed point, solved by iteration.

    python examples/torchopt_tutorial.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import tritonimplicit
from tritonimplicit.linear_solve import solve_inv, solve_normal_cg
from tritonimplicit.nn import ImplicitMetaGradientModule

STEPS, LEARNING_RATE, REG = 100, 2e-2, 1.0


def make_data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, w, b = torch.randn(20, 4), torch.randn(4, 1), torch.randn(1)
    return x, x @ w + b + 0.5 * torch.randn(20, 1)


def make_model() -> nn.Linear:
    model = nn.Linear(4, 1)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    return model


# --- Cases 1 and 2: functions ---------------------------------------------------------------------


def objective(params, meta_params, model, x, y):
    """The inner loss: fit the data, stay near the meta-parameters."""
    fit = F.mse_loss(functional_call(model, params, x), y)
    distance = sum((params[name] - meta_params[name]).square().sum() for name in params)
    return fit + 0.5 * REG * distance


def adapt(params, meta_params, model, x, y):
    """The inner solver: gradient descent, starting from `params`."""
    optimizer = tritonimplicit.sgd(lr=LEARNING_RATE)
    state = optimizer.init(params)
    gradient = torch.func.grad(objective)
    for _ in range(STEPS):
        grads = gradient(params, meta_params, model, x, y)
        updates, state = optimizer.update(grads, state)
        params = tritonimplicit.apply_updates(params, updates)
    return params


def imaml_by_functions(linear_solve) -> tuple[Tensor, ...]:
    x, y = make_data()
    model = make_model()
    meta_params = dict(model.named_parameters())
    params = tritonimplicit.module_clone(meta_params, by="deepcopy")

    # At the solution, the gradient of the objective in the parameters (argument 0) is zero.
    # argnums=1: the gradient of the solution is wanted in the meta-parameters.
    optimality = torch.func.grad(objective)
    solver = tritonimplicit.custom_root(optimality, argnums=1, solve=linear_solve)(adapt)

    adapted = solver(params, meta_params, model, x, y)
    outer_loss = functional_call(model, adapted, x).mean()
    return torch.autograd.grad(outer_loss, tuple(meta_params.values()))


# --- Case 3: a module -----------------------------------------------------------------------------


class AdaptedNet(ImplicitMetaGradientModule, linear_solve=solve_normal_cg(maxiter=5, atol=0)):
    def __init__(self, meta_net):
        super().__init__()
        self.meta_net = meta_net  # an argument: its parameters are meta-parameters
        self.net = tritonimplicit.module_clone(meta_net, by="deepcopy")  # made here: parameters

    def forward(self, x):
        return self.net(x)

    def objective(self, x, y):  # its gradient in the parameters is the optimality
        pairs = zip(self.parameters(), self.meta_parameters(), strict=True)
        distance = sum((p - meta).square().sum() for p, meta in pairs)
        return F.mse_loss(self(x), y) + 0.5 * REG * distance

    def solve(self, x, y):
        params = tuple(self.parameters())
        optimizer = tritonimplicit.SGD(params, lr=LEARNING_RATE)
        with torch.enable_grad():
            for _ in range(STEPS):
                optimizer.zero_grad()
                self.objective(x, y).backward(inputs=params)  # leaves the meta-parameters alone
                optimizer.step()
        return self


def imaml_by_module() -> tuple[Tensor, ...]:
    x, y = make_data()
    meta_net = make_model()
    outer_loss = AdaptedNet(meta_net).solve(x, y)(x).mean()
    return torch.autograd.grad(outer_loss, tuple(meta_net.parameters()))


# --- Case 4: a fixed point ------------------------------------------------------------------------


class FixedPoint(ImplicitMetaGradientModule, linear_solve=solve_normal_cg(maxiter=5, atol=0)):
    def __init__(self, layer, x0):
        super().__init__()
        self.layer = layer
        self.x = nn.Parameter(x0)

    def optimality(self):  # one residual for each parameter
        return (self.x - self.layer(self.x),)

    def solve(self):
        for _ in range(10):
            self.x.copy_(self.layer(self.x))
        return self


def fixed_point() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    solved = FixedPoint(layer, torch.randn(1, 4)).solve()
    return torch.autograd.grad(solved.x.mean(), tuple(layer.parameters()))


def main() -> list[tuple[Tensor, ...]]:
    cases = {
        "iMAML, functions, normal CG": imaml_by_functions(solve_normal_cg(maxiter=5, atol=0)),
        "iMAML, functions, Neumann": imaml_by_functions(solve_inv(ns=True, maxiter=100, alpha=0.1)),
        "iMAML, module, normal CG": imaml_by_module(),
        "fixed point, module, normal CG": fixed_point(),
    }
    for name, (weight, bias) in cases.items():
        print(f"{name}\n  weight {weight}\n  bias   {bias}")
    return list(cases.values())


if __name__ == "__main__":
    main()
