"""Gradients by hyper-parameters: a penalty for each feature, ridge and logistic regression.

The setting of Grazzi, Franceschi, Pontil and Salzo, "On the iteration complexity of hypergradient
computation", ICML 2020: how fast each method comes to the exact gradient, and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacrev

import tritonimplicit.linear_solve as ls
from bench import jax_peers, textbook
from bench.case import OURS, PLAIN, Absent, Case, Entry, Figures, Problem, Run, Setting, Tensors
from bench.libraries import library

EXAMPLES, FEATURES = 1000, 20
TIMED = 10
"""Iterations on the clock."""
TOLD = (1, 2, 5, 10, 20)
"""Iterations after which the error against the exact hypergradient is told."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
At = Callable[[int], Tensor]
"""A method's hypergradient after so many iterations."""


def square(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x @ w - y).square().mean()


def logistic(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.softplus(-y * (x @ w)).mean()


LOSSES: dict[str, Loss] = {"ridge": square, "logistic": logistic}


@dataclass(frozen=True)
class Penalised:
    """inner(w, h) = loss on training data + 0.5 sum of exp(h_j) w_j²; w solves it, h is given."""

    loss: Loss
    x: Tensor
    y: Tensor
    w: Tensor
    h: Tensor
    cotangent: Tensor
    step: float

    def inner(self, w: Tensor, h: Tensor) -> Tensor:
        return self.loss(w, self.x, self.y) + 0.5 * (h.exp() * w.square()).sum()

    def hessian(self) -> Tensor:
        matrix: Tensor = jacrev(grad(self.inner))(self.w, self.h)
        return matrix

    def pulled_back(self, u: Tensor) -> Tensor:
        """-u^T d²inner / dw dh."""
        return -u * self.h.exp() * self.w


def data(name: str, device: torch.device) -> Penalised:
    """Features of unequal size; the inner problem is solved by Newton's method, in float64."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1, FEATURES).double()
    x, x_out = scale * torch.randn(2, EXAMPLES, FEATURES, generator=rng).double()
    truth = torch.randn(FEATURES, generator=rng).double()
    y, y_out = (t @ truth + 0.5 * torch.randn(EXAMPLES, generator=rng).double() for t in (x, x_out))
    if name == "logistic":
        y, y_out = y.sign(), y_out.sign()
    h = (torch.rand(FEATURES, generator=rng) * 2 - 4).double()
    x, y, x_out, y_out, h = (t.to(device) for t in (x, y, x_out, y_out, h))
    given = Penalised(LOSSES[name], x, y, torch.zeros_like(h), h, h, step=0.0)
    w = given.w
    for _ in range(20):
        matrix, slope = jacrev(grad(given.inner))(w, h), grad(given.inner)(w, h)
        w = w - torch.linalg.solve(matrix, slope)
    cotangent = grad(LOSSES[name])(w, x_out, y_out)
    steepest = torch.linalg.eigvalsh(jacrev(grad(given.inner))(w, h))[-1].item()
    return Penalised(LOSSES[name], x, y, w, h, cotangent, step=1 / steepest)


def by_custom_root(module: Any, given: Penalised, solver: Callable[[int], Any]) -> At:
    def at(iterations: int) -> Tensor:
        root = module.diff.implicit.custom_root(
            grad(given.inner), argnums=1, solve=solver(iterations)
        )
        h = given.h.detach().requires_grad_()
        w = root(lambda init, h: init.clone())(given.w, h)
        (slope,) = torch.autograd.grad(w, h, given.cotangent)
        return slope

    return at


def by_hypertorch(module: Any, method: str, given: Penalised) -> At:
    def step(w: list[Tensor], h: list[Tensor]) -> list[Tensor]:
        return [w[0] - given.step * grad(given.inner)(w[0], h[0])]

    def outer(w: list[Tensor], h: list[Tensor]) -> Tensor:
        return w[0] @ given.cotangent

    def at(iterations: int) -> Tensor:
        h = [given.h.detach().requires_grad_()]
        settings: dict[str, Any] = {"tol": 0.0, "set_grad": False}
        slopes = getattr(module, method)([given.w], h, iterations, step, outer, **settings)
        slope: Tensor = slopes[0]
        return slope

    return at


def unrolled(given: Penalised) -> At:
    """Autograd through so many steps of gradient descent, which begin at the solution."""

    def at(iterations: int) -> Tensor:
        h, w = given.h.detach().requires_grad_(), given.w.detach().requires_grad_()
        for _ in range(iterations):
            (slope,) = torch.autograd.grad(given.inner(w, h), w, create_graph=True)
            w = w - given.step * slope
        (found,) = torch.autograd.grad(w, h, given.cotangent)
        return found

    return at


def direct(given: Penalised) -> At:
    return lambda iterations: given.pulled_back(
        torch.linalg.solve(given.hessian(), given.cotangent)
    )


# -- what is right -------------------------------------------------------------------------------


def by_textbook_cg(given: Penalised) -> At:
    matrix = given.hessian()

    def at(k: int) -> Tensor:
        return given.pulled_back(textbook.guarded_cg(lambda v: matrix @ v, given.cotangent, k))

    return at


def by_series(given: Penalised) -> At:
    """The Neumann series of so many terms."""
    matrix = given.hessian()

    def at(terms: int) -> Tensor:
        term, total = given.cotangent, torch.zeros_like(given.cotangent)
        for _ in range(terms):
            total = total + given.step * term
            term = term - given.step * (matrix @ term)
        return given.pulled_back(total)

    return at


def entry(name: str, at: At, oracle: At, right: Tensor) -> Entry:
    def prepare() -> Run:
        return lambda: (at(TIMED),)

    def figures(answer: Tensors) -> Figures:
        return {f"k = {k}": ((at(k) - right).norm() / right.norm()).item() for k in TOLD}

    return Entry(name, prepare, figures=figures, expected=(oracle(TIMED),))


def jaxopt(name: str, given: Penalised, setting: Setting, right: Tensor) -> Entry | Absent:
    module = jax_peers.jax_library("JAXopt", setting)
    if isinstance(module, Absent):
        return module
    import jax
    import jax.numpy as jnp

    def inner(w: Any, h: Any, x: Any, y: Any) -> Any:
        if name == "ridge":
            loss = 0.5 * jnp.mean((x @ w - y) ** 2)
        else:
            loss = jnp.mean(jax.nn.softplus(-y * (x @ w)))
        return loss + 0.5 * jnp.sum(jnp.exp(h) * w**2)

    def of(iterations: int) -> Entry:
        def slope(w: Any, h: Any, x: Any, y: Any, cotangent: Any) -> Any:
            solve = partial(module.linear_solve.solve_cg, maxiter=iterations, tol=0.0)
            root_vjp = module.implicit_diff.root_vjp
            return root_vjp(jax.grad(inner), w, (h, x, y), cotangent, solve=solve)[0]

        arguments = given.w, given.h, given.x, given.y, given.cotangent
        return jax_peers.entry("JAXopt, CG", slope, arguments)

    def at(iterations: int) -> Tensor:
        return of(iterations).prepare()()[0]

    told = entry("JAXopt, CG", at, by_textbook_cg(given), right)
    return Entry(
        told.provider,
        of(TIMED).prepare,
        figures=told.figures,
        expected=told.expected,
        in_torch=False,
    )


def build(name: str, setting: Setting) -> Problem:
    given = data(name, setting.device)
    right = direct(given)(0)
    cg, series = by_textbook_cg(given), by_series(given)
    ours = library(OURS)

    def neumann(terms: int) -> Any:
        return ls.Neumann(rtol=0.0, maxiter=terms - 1, alpha=given.step)

    def of(module: Any) -> Callable[[int], Any]:
        return lambda k: module.linear_solve.solve_cg(rtol=0.0, atol=0.0, maxiter=k)

    entries: list[Entry | Absent] = [
        entry(OURS, by_custom_root(ours, given, of(ours)), cg, right),
        entry(f"{OURS}, Neumann", by_custom_root(ours, given, neumann), series, right),
    ]
    torchopt, hypertorch = library("TorchOpt"), library("hypertorch")
    if isinstance(torchopt, Absent):
        entries.append(torchopt)
    else:
        at = by_custom_root(torchopt, given, of(torchopt))
        entries.append(entry("TorchOpt, CG", at, cg, right))
    for method, oracle in (("CG", cg), ("fixed_point", series)):
        title = f"hypertorch, {method.replace('_', ' ')}"
        if isinstance(hypertorch, Absent):
            entries.append(Absent(title, hypertorch.reason))
        else:
            entries.append(entry(title, by_hypertorch(hypertorch, method, given), oracle, right))
    entries += [
        jaxopt(name, given, setting, right),
        entry(f"{PLAIN}, unrolled", unrolled(given), series, right),
        entry(f"{PLAIN}, torch.linalg.solve", direct(given), lambda k: right, right),
    ]
    return Problem(
        about=f"{name} regression, {EXAMPLES} examples, {FEATURES} features, a penalty each, "
        f"{TIMED} iterations, float64",
        expected=(right,),
        tolerance=1e-8,
        entries=entries,
        error_is=f"relative, to the method's own {TIMED} iterations written out; "
        "under k to the exact gradient, after k iterations",
    )


CASES = [
    Case(f"hyperparameter/{name}", f"hypergradient of {name} regression", partial(build, name))
    for name in LOSSES
]
