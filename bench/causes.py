"""Why we lose where we lose: what profiles have shown, or presumed (of what XLA compiles)."""

from __future__ import annotations

UNKNOWN = "not looked into yet"

MEANING = {
    "compiled": "XLA compiles all of it: nothing of Python or of torch's dispatcher between the "
    "iterations",
    "LAPACK": "one call of LAPACK for a matrix that is small, and given",
    "calls": "calls of torch and the Python around them, not arithmetic: the vectors are small, "
    "and masks and statuses a system, dots in float64, layout, checks and the true residual take "
    "calls; see that column",
    "float64": "dots in float64, and statuses: vectors that fit in a cache are widened in more "
    "time than their work takes",
    "biased": "another gradient, by one vjp or five and no solve: see its cosine",
}
"""What the words of CAUSES stand for."""

CAUSES: tuple[tuple[str, str, str], ...] = (
    ("", "JAXopt", "compiled"),
    ("", "lineax", "compiled"),
    ("", "plain torch, torch.linalg.solve", "LAPACK"),
    ("deq/gradients", "torchdeq, default", "biased"),
    ("deq/gradients", "torchdeq, phantom", "biased"),
    ("deq/training", "torchdeq, default", "biased"),
    ("hypergradient/mlp-normal_cg", "plain torch", "float64"),
    ("hypergradient/mlp-module-normal_cg", "plain torch", "float64"),
    ("steps/cg-1e5", "plain torch", "float64"),
    ("steps/cg-64x1e4", "plain torch", "float64"),
    ("scaling/size-1e3", "", "calls"),
    ("scaling/size-1e4", "", "calls"),
    ("scaling/batch-1", "", "calls"),
    ("scaling/batch-4", "", "calls"),
    ("solvers/spd-strakos", "", "calls"),
    ("solvers/indefinite-strakos", "", "calls"),
    ("hyperparameter/", "TorchOpt", "calls"),
)
"""Beginnings of a case's and of a provider's name, and the cause; the first that fits is told."""


def cause(case: str, provider: str) -> str:
    """Why we lose this case to this provider."""
    for begins, who, why in CAUSES:
        if case.startswith(begins) and provider.startswith(who):
            return why
    return UNKNOWN
