"""Modules whose parameters are the solution of an inner problem."""

from tritonimplicit.diff.implicit.nn.module import ImplicitMetaGradientModule

__all__ = ["ImplicitMetaGradientModule"]
