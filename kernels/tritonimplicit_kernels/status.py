"""What a batched solve says of one system: an int32 code a system, in row 0 of `state`.

Codes below zero run; codes from zero on are final, and freeze the system. A running CG also
remembers the sign of the curvature p.Ap that it has seen, to notice when the sign changes.
"""

from __future__ import annotations

from typing import Final

RUNNING_NEGATIVE: Final = -3
RUNNING_POSITIVE: Final = -2
RUNNING: Final = -1
CONVERGED: Final = 0
MAX_ITERATIONS: Final = 1
STAGNATED: Final = 2
BREAKDOWN: Final = 3
INDEFINITE: Final = 4
DIVERGED: Final = 5
NON_FINITE: Final = 6
PRECONDITIONER: Final = 7
