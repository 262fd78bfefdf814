"""Fixed-point correction: a loss on the way to the fixed point, not at its end alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tritonimplicit.diagnostics import TensorTree
from tritonimplicit.linear_solve.base import check_count, check_real


def fixed_point_correction(
    loss: Callable[[TensorTree], Tensor], states: Sequence[TensorTree], decay: float = 0.8
) -> Tensor:
    """Return the sum of decay^(n - 1 - k) loss(states[k]), k = 0 .. n - 1.

    `states` come nearer and nearer to the fixed point, as those of `deq(x, corrections=(3, 6))`.
    The loss of the early ones makes the solver's way shorter. Raises ValueError for no states, or a
    decay that is not positive.

    Bai, Geng, Savani and Kolter, "Deep equilibrium optical flow estimation", CVPR 2022.
    """
    check_real("decay", decay)
    if decay <= 0:
        raise ValueError(f"decay must be positive, not {decay!r}.")
    if not states:
        raise ValueError("there are no states to take the loss of.")
    total = loss(states[0])
    for state in states[1:]:  # by Horner's rule
        total = decay * total + loss(state)
    return total


def check_iterations(corrections: Sequence[int]) -> None:
    """Raise unless these are numbers of iterations, ascending."""
    for k in corrections:
        check_count("each number of iterations in corrections", k)
    if list(corrections) != sorted(set(corrections)):
        raise ValueError(f"corrections must ascend, not {tuple(corrections)}.")
