"""Batched linear solvers with one contract; `solve_cg` and its kin build them as TorchOpt's do."""

from tritonimplicit.linear_solve.base import IterativeSolver, LinearSolver
from tritonimplicit.linear_solve.cg import CG, solve_cg
from tritonimplicit.linear_solve.dense import Dense
from tritonimplicit.linear_solve.inverse import solve_inv
from tritonimplicit.linear_solve.neumann import Neumann
from tritonimplicit.linear_solve.normal_cg import NormalCG, solve_normal_cg
from tritonimplicit.linear_solve.preconditioners import Jacobi, Nystrom

__all__ = [
    "CG",
    "Dense",
    "IterativeSolver",
    "Jacobi",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "solve_cg",
    "solve_inv",
    "solve_normal_cg",
]
