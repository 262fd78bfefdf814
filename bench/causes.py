"""Why we lose where we lose: what profiles of the cases have shown."""

from __future__ import annotations

UNKNOWN = "not looked into yet"

_COMPILED = "compiled by XLA: nothing of Python or of torch's dispatcher between the iterations"
_DIRECT = "one call of LAPACK for a matrix that is small, and given"
_CALLS = (
    "calls, not arithmetic: counted by a dispatch mode, an iteration of our CG or Neumann series "
    "makes 53 calls of torch (masks and statuses a system, dots in float64), TorchOpt's CG 12; and "
    "a solve 140 more (layout, checks, the true residual)"
)
_BIASED = "another, biased gradient: see its cosine"

CAUSES: tuple[tuple[str, str, str], ...] = (
    ("", "JAXopt", _COMPILED),
    ("", "lineax", _COMPILED),
    ("", "plain torch, torch.linalg.solve", _DIRECT),
    ("deq/gradients", "torchdeq, default", _BIASED),
    ("deq/gradients", "torchdeq, phantom", _BIASED),
    ("deq/training", "torchdeq, default", "one vjp a step, a biased gradient, for our ten or more"),
    *((f"scaling/{small}", "", _CALLS) for small in ("size-1e3", "size-1e4", "batch-1", "batch-4")),
    ("solvers/spd-strakos", "", _CALLS),
    ("solvers/indefinite-strakos", "", _CALLS),
    ("hyperparameter/", "", _CALLS),
    ("hypergradient/linear", "", _CALLS),
)
"""Beginnings of a case's and of a provider's name, and the cause; the first that fits is told."""


def cause(case: str, provider: str) -> str:
    """Why we lose this case to this provider."""
    for begins, who, why in CAUSES:
        if case.startswith(begins) and provider.startswith(who):
            return why
    return UNKNOWN
