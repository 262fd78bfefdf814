"""All cases, a file a family."""

from __future__ import annotations

from collections.abc import Sequence

from bench import batched, hypergradient, leaves, memory, steps
from bench.case import Case

CASES: tuple[Case, ...] = (
    *hypergradient.CASES,
    *batched.CASES,
    *steps.CASES,
    *leaves.CASES,
    *memory.CASES,
)


def select(names: Sequence[str]) -> list[Case]:
    """The cases and families of these names, or all; ValueError for a name of neither."""
    known = {case.name for case in CASES} | {case.family for case in CASES}
    for name in names:
        if name not in known:
            raise ValueError(f"there is no case or family {name!r}; known are {sorted(known)}")
    return [case for case in CASES if not names or {case.name, case.family} & set(names)]
