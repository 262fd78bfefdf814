"""Modules with implicit gradients, and what goes with deep equilibrium models."""

from tritonimplicit.diff.implicit.nn.module import ImplicitMetaGradientModule
from tritonimplicit.nn.deq import DEQ
from tritonimplicit.nn.equilibrium import Equilibrium
from tritonimplicit.nn.gradients import JFB, Implicit, Phantom, Unrolled
from tritonimplicit.nn.stability import jacobian_penalty, spectral_radius

__all__ = [
    "DEQ",
    "JFB",
    "Equilibrium",
    "Implicit",
    "ImplicitMetaGradientModule",
    "Phantom",
    "Unrolled",
    "jacobian_penalty",
    "spectral_radius",
]
