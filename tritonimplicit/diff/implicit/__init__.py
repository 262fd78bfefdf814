"""Implicit differentiation of the solutions of optimisation problems and fixed points."""

from tritonimplicit.diff.implicit.decorator import custom_root
from tritonimplicit.diff.implicit.fixed_point import custom_fixed_point
from tritonimplicit.diff.implicit.nn.module import ImplicitMetaGradientModule

__all__ = ["ImplicitMetaGradientModule", "custom_fixed_point", "custom_root"]
