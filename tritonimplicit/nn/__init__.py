"""Modules with implicit gradients."""

from tritonimplicit.diff.implicit.nn.module import ImplicitMetaGradientModule

__all__ = ["ImplicitMetaGradientModule"]
