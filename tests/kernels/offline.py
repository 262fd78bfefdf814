"""Kernels compiled for a GPU that is not there, and their launches written down."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from triton import JITFunction
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from tools import kernels_check as check
from tritonimplicit_kernels import triton as kernels
from tritonimplicit_kernels.triton import start as starting


class Launches:
    """What a GPU that is not there was asked to run, and the compilations that took."""

    def __init__(self) -> None:
        self.driver = check.OfflineDriver(check.TARGETS[1])
        self.made: list[tuple[Any, ...]] = []
        self.compiled: list[str] = []
        self.by_triton = 0

    def take(self) -> tuple[Any, ...]:
        """Return the one launch made since: the grid, the stream, the form and its arguments."""
        (launch,) = self.made
        self.made.clear()
        x, y, z, stream, function, packed, metadata, _enter, _exit, *args = launch
        return x, y, z, stream, function, packed, metadata.get(), args


def kernel_called(name: str) -> Any:
    launcher = getattr(kernels, name.removeprefix("_").removesuffix("_kernel"))
    return getattr(importlib.import_module(launcher.__module__), name)


@contextmanager
def launches_written_down(keep: bool = True) -> Iterator[Launches]:
    """Forget all compiled forms until the end; with `keep`, those launched are kept as on CUDA."""
    seen = Launches()
    run = JITFunction.run

    def init_handles(form: Any) -> None:
        if form.module is None:
            form.module, form.function = object(), object()
            form._run = lambda *launch: seen.made.append(launch)
            seen.compiled.append(form.name)

    def count(*args: Any, **options: Any) -> Any:
        seen.by_triton += 1
        return run(*args, **options)

    with ExitStack() as changes:
        for changed in (
            mock.patch.multiple(starting, _forms={}, _KEEPS=keep),
            mock.patch.object(driver, "_active", seen.driver),
            mock.patch.object(CompiledKernel, "_init_handles", init_handles),
            mock.patch.object(JITFunction, "run", count),
            *(mock.patch.dict(kernel_called(name).device_caches) for name in check.kernel_names()),
        ):
            changes.enter_context(changed)
        for name in check.kernel_names():
            kernel_called(name).device_caches.clear()
        yield seen
