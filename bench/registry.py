"""All cases, a file a family."""

from __future__ import annotations

from collections.abc import Sequence

from bench import (
    batched,
    deq,
    deq_memory,
    hypergradient,
    hyperparameter,
    leaves,
    memory,
    scaling,
    solvers,
    steps,
)
from bench.case import Case

CASES: tuple[Case, ...] = (
    *hypergradient.CASES,
    *batched.CASES,
    *hyperparameter.CASES,
    *deq.CASES,
    *solvers.CASES,
    *scaling.CASES,
    *steps.CASES,
    *leaves.CASES,
    *memory.CASES,
    *deq_memory.CASES,
)

ABOUT = {
    "hypergradient": "One iMAML hypergradient of a small network: the backward pass alone.",
    "batched": "iMAML hypergradients of many small tasks at a time: one batched solve, or a loop.",
    "hyperparameter": "Gradients by the penalties of ridge and logistic regression, and how fast "
    "each method comes to the exact one.",
    "deq": "Trained deep equilibrium models: one system a sample. torchdeq stops by other "
    "residuals than the true one, so each of its solvers is told the least number of iterations "
    "that reaches it, which a user does not know; `default` is what it does when not told.",
    "solvers": "Dense systems from benign to vicious, each library asked for 1e-8 by its own test.",
    "scaling": "How the time of 20 CG iterations grows.",
    "steps": "One CG iteration without its matvec.",
    "leaves": "One CG iteration whose product comes in several tensors.",
    "memory": "Peak memory of a solve, beyond b and the operator.",
    "memory-deq": "Peak memory of a training step by the number of forward iterations.",
}
"""A family in a sentence."""


def select(names: Sequence[str], quick: bool = False) -> list[Case]:
    """The cases and families of these names, or all; ValueError for a name of neither.

    Of a family, and of all, a quick run has the cases that are brief.
    """
    known = {case.name for case in CASES} | {case.family for case in CASES}
    for name in names:
        if name not in known:
            raise ValueError(f"there is no case or family {name!r}; known are {sorted(known)}")

    def chosen(case: Case) -> bool:
        of_many = (not names or case.family in names) and (case.brief or not quick)
        return case.name in names or of_many

    return [case for case in CASES if chosen(case)]
