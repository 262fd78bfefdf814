"""JAX on the CPU, for the peers that are written for it: the same tensors, and the same threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.utils.dlpack

from bench.case import Absent, Entry, Run, Setting, Tensors
from bench.libraries import library


def jax_library(name: str, setting: Setting) -> ModuleType | Absent:
    """A peer that needs JAX, with float64 allowed and as many threads as torch has."""
    if setting.device.type != "cpu":
        return Absent(name, "JAX is compared on the CPU alone")
    if torch.get_num_threads() == 1:  # else XLA takes all cores; it reads this once, at import
        one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ.setdefault("XLA_FLAGS", one)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    module = library(name)
    if isinstance(module, ModuleType):
        import jax

        jax.config.update("jax_enable_x64", True)
    return module


def to_jax(tensors: Tensors) -> tuple[Any, ...]:
    """The same memory as JAX arrays."""
    import jax

    return tuple(jax.dlpack.from_dlpack(t.detach().contiguous()) for t in tensors)


def entry(
    name: str,
    function: Callable[..., Any],
    arguments: Tensors,
    matvecs: Callable[[], int] | None = None,
) -> Entry:
    """An entry that calls `function`, compiled beforehand, with `arguments` as JAX arrays.

    It returns an array or a sequence of them. The clock stops when they are computed.
    """
    import jax

    compiled = jax.jit(function)

    def prepare() -> Run:
        arrays = to_jax(arguments)

        def run() -> Tensors:
            answer = jax.block_until_ready(compiled(*arrays))
            leaves = jax.tree_util.tree_leaves(answer)
            return tuple(torch.utils.dlpack.from_dlpack(leaf) for leaf in leaves)

        return run

    return Entry(name, prepare, matvecs, in_torch=False)


class Calls:
    """Counts how often a compiled function comes by."""

    def __init__(self) -> None:
        self.count = 0

    def counted(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`function`, counted."""
        import jax

        def called(v: Any) -> Any:
            jax.debug.callback(self._add)
            return function(v)

        return called

    def _add(self) -> None:
        self.count += 1
