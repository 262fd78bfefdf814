"""Peak memory of one run, beyond what was there before it, and the ops that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bench.case import Run


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most bytes of tensors alive at a time that `run` made, its answer among them."""
    return peak_and_calls(run, device)[0]


def peak_and_calls(run: Run, device: torch.device) -> tuple[int, int | None]:
    """The peak, and how many ops torch dispatched: None on CUDA, where nothing is traced.

    On CUDA that is the allocator's count; on a CPU the storages alive after each op that torch
    dispatches, so that what a single op allocates and frees inside itself is not seen.
    """
    if device.type != "cuda":
        live = _LiveStorages()
        with live:
            run()
        return live.peak, live.calls
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before: int = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device)
    return peak - before, None


class _LiveStorages(TorchDispatchMode):
    """Follows the storages that ops have made. An op's own arguments were there before it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.calls = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = 0  # of `_live`, some of which may have ended since
        self._older: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        for storage in _storages((args, kwargs)):
            key, reference = storage._cdata, StorageWeakRef(storage)
            if not _holds(self._live.get(key)):
                self._older[key] = reference
        result = func(*args, **kwargs)
        for storage in _storages(result):
            key = storage._cdata
            older = self._older.get(key)
            if older is None or older.expired():
                _, before = self._live.get(key, (None, 0))
                self._live[key] = StorageWeakRef(storage), storage.nbytes()
                self._bytes += storage.nbytes() - before
        if self._bytes > self.peak:  # else those that have ended, of many, need not be found
            self._live = {key: kept for key, kept in self._live.items() if _holds(kept)}
            self._bytes = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._bytes)
        return result


def _holds(kept: tuple[StorageWeakRef, int] | None) -> bool:
    return kept is not None and not kept[0].expired()


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = optree.tree_leaves(tree)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
