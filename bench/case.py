"""What a benchmark is made of: a case builds one problem, and entries solve it on its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Run: TypeAlias = Callable[[], Tensors]

OURS = "tritonimplicit"
PLAIN = "plain torch"


@dataclass(frozen=True)
class Setting:
    """Where a case runs, and whether on a smaller problem."""

    device: torch.device
    quick: bool = False


@dataclass(frozen=True)
class Entry:
    """One provider's way to the answer.

    `prepare` does what is not to be timed and returns what is: a function that returns the answer.
    `matvecs` counts the products with the matrix or its transpose in one such run, off the clock.
    """

    provider: str
    prepare: Callable[[], Run]
    matvecs: Callable[[], int] | None = None


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


@dataclass(frozen=True)
class MemoryGoal:
    """Our peak is to be at most `vectors` vectors, to two decimals: scalars are none."""

    vectors: float


@dataclass(frozen=True)
class Problem:
    """One problem, and everyone who solves it.

    `expected` is the right answer in float64; an answer is right whose relative error, all tensors
    taken together, is at most `tolerance`. A run does `repeats` units of work; times are of one.
    `vector_bytes` is the size of a vector of the problem, the unit of memory where it is given.
    """

    about: str
    expected: Tensors
    tolerance: float
    entries: Sequence[Entry | Absent]
    repeats: int = 1
    vector_bytes: int | None = None
    goal: SpeedGoal | MemoryGoal | None = None


@dataclass(frozen=True)
class Case:
    """A named benchmark, "family/member"."""

    name: str
    about: str
    build: Callable[[Setting], Problem]

    @property
    def family(self) -> str:
        return self.name.split("/")[0]
