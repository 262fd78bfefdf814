"""Why we lose where we lose: of `PROFILED` what profiles have shown, else what counts tell."""

from __future__ import annotations

UNKNOWN = "not looked into yet"
PROFILED = ("hypergradient", "steps", "deq")
"""Families of which cases were profiled. What XLA compiles was not."""

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
    "unverified": "it tests no residual that it returns, each sample's least of all: no norms, no "
    "statuses, no product for the truth, and fewer calls; the benchmark has found out for it "
    "how many iterations it needs",
    "method": "normal CG needs fewer products for this matrix than the method that we list first",
    "unrolled": "the states of all iterations still fit in memory; nothing is solved or checked",
}
"""What the words of CAUSES stand for."""

CAUSES: tuple[tuple[str, str, str], ...] = (
    ("", "JAXopt", "compiled"),
    ("", "lineax", "compiled"),
    ("", "plain torch, torch.linalg.solve", "LAPACK"),
    ("solvers/general-grcar", "TorchOpt", "method"),
    ("solvers/indefinite-benign", "TorchOpt", "method"),
    ("deq/gradients", "torchdeq, default", "biased"),
    ("deq/gradients", "torchdeq, phantom", "biased"),
    ("deq/training", "torchdeq, default", "biased"),
    ("deq/", "torchdeq", "unverified"),
    ("deq/", "plain torch", "unverified"),
    ("memory-deq/", "plain torch", "unrolled"),
    ("hypergradient/mlp", "plain torch", "float64"),
    ("hypergradient/", "", "calls"),
    ("hyperparameter/", "", "calls"),
    ("steps/", "plain torch", "float64"),
    ("scaling/size-1e5", "", "float64"),
    ("scaling/size-1e6", "", "float64"),
    ("scaling/size-1e7", "", "float64"),
    ("scaling/batch-256", "", "float64"),
    ("scaling/batch-1024", "", "float64"),
    ("scaling/", "", "calls"),
    ("solvers/", "", "calls"),
    ("batched/", "", "calls"),
)
"""Beginnings of a case's and of a provider's name, and the cause; the first that fits is told."""


def cause(case: str, provider: str) -> str:
    """Why we lose this case to this provider."""
    for begins, who, why in CAUSES:
        if case.startswith(begins) and provider.startswith(who):
            return why
    return UNKNOWN
