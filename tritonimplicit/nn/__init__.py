"""Modules with implicit gradients, and what goes with deep equilibrium models."""

from tritonimplicit.diff.implicit.nn.module import ImplicitMetaGradientModule
from tritonimplicit.nn.correction import fixed_point_correction
from tritonimplicit.nn.deq import DEQ
from tritonimplicit.nn.equilibrium import Equilibrium
from tritonimplicit.nn.gradients import JFB, SHINE, Implicit, Phantom, Unrolled
from tritonimplicit.nn.normalisation import spectral_norm, weight_norm
from tritonimplicit.nn.stability import jacobian_penalty, spectral_radius
from tritonimplicit.nn.torchdeq import torchdeq_solver
from tritonimplicit.nn.warm_start import WarmStart

__all__ = [
    "DEQ",
    "JFB",
    "SHINE",
    "Equilibrium",
    "Implicit",
    "ImplicitMetaGradientModule",
    "Phantom",
    "Unrolled",
    "WarmStart",
    "fixed_point_correction",
    "jacobian_penalty",
    "spectral_norm",
    "spectral_radius",
    "torchdeq_solver",
    "weight_norm",
]
