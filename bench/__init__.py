"""Benchmarks: ours and its peers on the same tensors, each answer checked before a clock."""
