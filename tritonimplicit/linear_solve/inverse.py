"""TorchOpt's `solve_inv`: a dense solve, or the Neumann series in its place."""

from __future__ import annotations

from typing import Any

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import build
from tritonimplicit.linear_solve.dense import Dense
from tritonimplicit.linear_solve.neumann import Neumann
from tritonimplicit.operators import Matvec


def solve_inv(
    *,
    ns: bool = False,
    matvec: Matvec | None = None,
    b: TensorTree | None = None,
    **fields: Any,
) -> Dense | Neumann:
    """Return a solver by the inverse, `(matvec, b) -> x`: `Neumann` if `ns`, else `Dense`.

    `fields` are those of the solver that is returned. `matvec` and `b` are accepted and not used,
    as by `solve_cg`.
    """
    return build(Neumann, fields) if ns else build(Dense, fields)
