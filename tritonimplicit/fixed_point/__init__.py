"""Solvers of fixed points z = f(z), one a file, one contract for all."""

from tritonimplicit.fixed_point.anderson import Anderson
from tritonimplicit.fixed_point.base import FixedPointSolver
from tritonimplicit.fixed_point.broyden import Broyden
from tritonimplicit.fixed_point.picard import Picard

__all__ = ["Anderson", "Broyden", "FixedPointSolver", "Picard"]
