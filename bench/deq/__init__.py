"""Deep equilibrium models, trained: solves forwards and backwards, gradients, a training."""

from bench.deq import backward, forward, gradients, training

CASES = [*backward.CASES, *forward.CASES, *gradients.CASES, *training.CASES]

__all__ = ["CASES"]
