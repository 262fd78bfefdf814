"""The linear solvers as functions of a matrix and a right hand side."""

from tritonimplicit.linalg.cg import cg
from tritonimplicit.linalg.ns import ns, ns_inv

__all__ = ["cg", "ns", "ns_inv"]
