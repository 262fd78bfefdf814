"""Batched linear solvers with one contract; `solve_cg` and its kin build them as TorchOpt's do."""

from tritonimplicit.linear_solve.auto import Auto, solve_auto
from tritonimplicit.linear_solve.base import LinearSolver
from tritonimplicit.linear_solve.bicgstab import BiCGSTAB, solve_bicgstab
from tritonimplicit.linear_solve.cg import CG, solve_cg
from tritonimplicit.linear_solve.dense import Dense
from tritonimplicit.linear_solve.gmres import GMRES, solve_gmres
from tritonimplicit.linear_solve.inverse import solve_inv
from tritonimplicit.linear_solve.iterative import FusedSolver, IterativeSolver
from tritonimplicit.linear_solve.minres import MINRES, solve_minres
from tritonimplicit.linear_solve.neumann import Neumann
from tritonimplicit.linear_solve.normal_cg import NormalCG, solve_normal_cg
from tritonimplicit.linear_solve.preconditioners import Jacobi, Nystrom

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Auto",
    "BiCGSTAB",
    "Dense",
    "FusedSolver",
    "IterativeSolver",
    "Jacobi",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "solve_auto",
    "solve_bicgstab",
    "solve_cg",
    "solve_gmres",
    "solve_inv",
    "solve_minres",
    "solve_normal_cg",
]
