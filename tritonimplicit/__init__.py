"""Gradients through the solution of an optimisation problem or a fixed point, in PyTorch."""

from tritonimplicit import diff, fixed_point, linalg, linear_solve, nn, optim
from tritonimplicit.diagnostics import ConvergenceError, ConvergenceWarning, Solution, Status
from tritonimplicit.diff.implicit import custom_fixed_point, custom_root
from tritonimplicit.linear_operator import LinearOperator
from tritonimplicit.opaque import compilable
from tritonimplicit.optim import SGD, apply_updates, module_clone, sgd
from tritonimplicit.solve_log import SolveLog, record_solves

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "ConvergenceError",
    "ConvergenceWarning",
    "LinearOperator",
    "Solution",
    "SolveLog",
    "Status",
    "apply_updates",
    "compilable",
    "custom_fixed_point",
    "custom_root",
    "diff",
    "fixed_point",
    "linalg",
    "linear_solve",
    "module_clone",
    "nn",
    "optim",
    "record_solves",
    "sgd",
]
