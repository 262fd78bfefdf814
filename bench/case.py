"""What a benchmark is made of: a case builds one problem, and entries solve it on its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Run: TypeAlias = Callable[[], Tensors]

Figures: TypeAlias = dict[str, float]

OURS = "tritonimplicit"
PLAIN = "plain torch"

SAME_ITERATIONS, SAME_RESIDUAL = "same iterations", "same true residual reached"
"""What is the same for all providers of a problem."""


@dataclass(frozen=True)
class Setting:
    """Where a case runs, and whether on a smaller problem."""

    device: torch.device
    quick: bool = False


@dataclass(frozen=True)
class Entry:
    """One provider's way to the answer.

    `prepare` does what is not to be timed and returns what is: a function that returns the answer.
    `matvecs` counts the products with the matrix or its transpose in one such run, off the clock;
    `figures` is what else is to be told of an answer. `expected` is this entry's own oracle, where
    another answer than the problem's is right for it, and `tolerance` its own tolerance.
    `in_torch` is false for one whose memory torch knows nothing of.
    """

    provider: str
    prepare: Callable[[], Run]
    matvecs: Callable[[], int] | None = None
    figures: Callable[[Tensors], Figures] | None = None
    expected: Tensors | None = None
    tolerance: float | None = None
    in_torch: bool = True


@dataclass(frozen=True)
class Absent:
    """A provider that does not take part, and why."""

    provider: str
    reason: str


@dataclass(frozen=True)
class SpeedGoal:
    """Our time is to be at most the peer's divided by `factor`."""

    peer: str
    factor: float
    ours: str = OURS


@dataclass(frozen=True)
class MemoryGoal:
    """Our peak is to be at most `vectors` vectors, to two decimals: scalars are none."""

    vectors: float


@dataclass(frozen=True)
class ProductGoal:
    """We are to need at most `products` products."""

    products: int


Goal: TypeAlias = SpeedGoal | MemoryGoal | ProductGoal


@dataclass(frozen=True)
class Problem:
    """One problem, and everyone who solves it.

    `expected` is the right answer in float64; an answer is right whose relative error, all tensors
    taken together, is at most `tolerance`. Where many answers are right, `error` measures an answer
    in the place of that, in float64, and `error_is` says how. A run does `repeats` units of work;
    times are of one. `compares` says what all providers have in common. `vector_bytes` is the size
    of a vector of the problem, the unit of memory where it is given. `product` prepares one product
    with the matrix, which is timed as well: whoever solves the problem has to do some.
    """

    about: str
    expected: Tensors
    tolerance: float
    entries: Sequence[Entry | Absent]
    repeats: int = 1
    vector_bytes: int | None = None
    goals: Sequence[Goal] = ()
    compares: str = SAME_ITERATIONS
    error: Callable[[Tensors], float] | None = None
    error_is: str = "relative, to float64"
    product: Callable[[], Callable[[], object]] | None = None


@dataclass(frozen=True)
class Case:
    """A named benchmark, "family/member"; `brief` if a quick run of everything has it too."""

    name: str
    about: str
    build: Callable[[Setting], Problem]
    brief: bool = True

    @property
    def family(self) -> str:
        return self.name.split("/")[0]
