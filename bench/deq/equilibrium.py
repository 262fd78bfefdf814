"""A trained model at its fixed point: one problem for all who solve, forwards and backwards."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.case import Entry, Run, Setting, Tensors
from bench.models import Model, images, load, text
from bench.models.language import CONTEXT
from tritonimplicit.fixed_point import Anderson
from tritonimplicit.linear_solve import GMRES

Map = Callable[[Tensor], Tensor]

MODELS = {
    "conv": "the demo's convolutional DEQ (contracts: norm at most 0.95)",
    "multiscale": "multi-scale DEQ (norm at most 1.5)",
    "lm": "byte language model (does not contract)",
}
RULES = ("worst", "whole")
"""Whose residual counts: that of the worst sample, or of the batch as one vector."""
LIMIT = 200
"""Products or evaluations that a solver may take."""


@dataclass(frozen=True)
class Equilibrium:
    """z = f(z) of a trained model, and the cotangent dl/dz there; all (B, ...)."""

    model: Model
    inputs: Tensors
    start: Tensor
    z: Tensor
    cotangent: Tensor
    x: Tensor
    y: Tensor

    def f(self, z: Tensor) -> Tensor:
        """The cell, to which a sample of a batch is its own system."""
        return self.model.cell(z, *self.inputs)

    def vjp(self) -> Map:
        """v -> J^T v at z, J = df/dz; recorded once."""
        z = self.z.detach().requires_grad_()
        with torch.enable_grad():
            fz = self.f(z)

        def product(v: Tensor) -> Tensor:
            (result,) = torch.autograd.grad(fz, z, v, retain_graph=True)
            return result

        return product

    def double(self) -> Equilibrium:
        """The same tensors in float64."""
        model = copy.deepcopy(self.model).double()
        tensors = (self.start, self.z, self.cotangent)
        start, z, cotangent = (t.double() for t in tensors)
        x = self.x.double() if self.x.is_floating_point() else self.x
        inputs = tuple(t.double() for t in self.inputs)
        return replace(self, model=model, inputs=inputs, start=start, z=z, cotangent=cotangent, x=x)


@functools.cache
def trained(name: str, setting: Setting) -> Equilibrium:
    """The model on images or text that it was not trained on."""
    model = load(name, setting.device)
    x, y = _data(name, setting)
    inputs = tuple(t.detach() for t in model.inputs(x))
    start = model.start(x)
    unsolved = Equilibrium(model, inputs, start, start, start, x, y)
    exact = unsolved.double()
    found = Anderson(rtol=1e-11, maxiter=2000, batch_ndim=1, on_failure="raise")
    z = found(exact.f, exact.start).requires_grad_()
    (cotangent,) = torch.autograd.grad(exact.model.loss(z, y), z)
    dtype = inputs[0].dtype
    return replace(unsolved, z=z.detach().to(dtype), cotangent=cotangent.to(dtype))


@functools.cache
def exact_adjoint(name: str, setting: Setting) -> Tensor:
    """u with (I - J^T) u = dl/dz in float64, to 1e-10 by the residual."""
    exact = trained(name, setting).double()
    vjp = exact.vjp()
    solver = GMRES(rtol=1e-10, restart=50, maxiter=4000, batch_ndim=1, on_failure="raise")
    with torch.no_grad():
        u: Tensor = solver(lambda v: v - vjp(v), exact.cotangent)
    left = relative(exact.cotangent - u + vjp(u), exact.cotangent, "worst")
    if not left <= 2e-10:
        raise RuntimeError(f"the exact adjoint of {name} is not exact: its residual is {left:.1e}")
    return u


def _data(name: str, setting: Setting) -> tuple[Tensor, Tensor]:
    if name == "lm":
        size = 4 if setting.quick else 16
        ((x, y),) = text.batches(1, size, CONTEXT, seed=7, held_out=True)
        return x.to(setting.device), y.to(setting.device)
    x, y = images.sample(setting.device)
    size = 16 if setting.quick else len(x)
    return x[:size], y[:size]


def relative(residual: Tensor, scale: Tensor, rule: str) -> float:
    """‖residual‖ / ‖scale‖ of the worst sample, or of the whole batch."""
    if rule == "whole":
        return float(torch.linalg.vector_norm(residual) / torch.linalg.vector_norm(scale))
    return float((norms(residual) / norms(scale)).max())


def norms(batch: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    found: Tensor = torch.linalg.vector_norm(batch.flatten(1), dim=1)
    return found


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Map):
        self._function, self.calls = function, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self._function(v)


def counted_entry(provider: str, make: Callable[[], Map], run: Callable[[Map], Tensors]) -> Entry:
    """An entry that runs `run(f)`, f made by `make` off the clock; its products are f's calls."""

    def prepare() -> Run:
        f = make()
        return lambda: run(f)

    def matvecs() -> int:
        counted = Counted(make())
        run(counted)
        return counted.calls

    return Entry(provider, prepare, matvecs)
