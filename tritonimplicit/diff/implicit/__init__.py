"""Implicit differentiation of the solutions of optimisation problems and fixed points."""

from tritonimplicit.diff.implicit.decorator import custom_root

__all__ = ["custom_root"]
