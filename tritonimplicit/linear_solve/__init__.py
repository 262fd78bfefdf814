"""Batched linear solvers with one contract; `solve_cg` and its kin build them as TorchOpt's do."""

from tritonimplicit.linear_solve.base import LinearSolver
from tritonimplicit.linear_solve.cg import CG, solve_cg
from tritonimplicit.linear_solve.dense import Dense
from tritonimplicit.linear_solve.inverse import solve_inv
from tritonimplicit.linear_solve.iterative import FusedSolver, IterativeSolver
from tritonimplicit.linear_solve.neumann import Neumann
from tritonimplicit.linear_solve.normal_cg import NormalCG, solve_normal_cg

__all__ = [
    "CG",
    "Dense",
    "FusedSolver",
    "IterativeSolver",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "solve_cg",
    "solve_inv",
    "solve_normal_cg",
]
