"""One case at one size: its tensors, the check of an answer, and the two that are timed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.backends import backend
from tritonimplicit_kernels.bench.cases import Case, Size
from tritonimplicit_kernels.bench.clock import Run, Tensors
from tritonimplicit_kernels.layout import SHAPES, dtype_of, shape_of

_COMMON: Final = {"state": status.RUNNING, "threshold": 0.0, "limit": math.inf, "unit": 1.0}
NUMBERS: Final = {"maxiter": 1000}


class Trial:
    """Both contenders on the same numbers, drawn in float64 and then rounded to `dtype`."""

    def __init__(self, case: Case, size: Size, dtype: torch.dtype, device: torch.device):
        start = case.start(size, device)
        self.case = case
        self.expected = _answer(case.unfused(**_known_to(case, start)))
        # A result is a few roundings of numbers up to five times its size; sums of n products err
        # by sqrt(n) units where the roundings are independent.
        self.tolerance = (32 + size.n**0.5) * torch.finfo(dtype).eps
        self._start = {name: value.to(dtype) for name, value in start.items()}
        self._backend = backend("auto", device, dtype)
        sizes = {"B": size.systems, "P": self._backend.partial_count(size.n)}
        sizes |= {"ld": size.n, "n": size.n}
        self.arguments = {
            name: _argument(name, start, sizes, dtype, device)
            for op in case.launches
            for name in argument_names(op)
            if name not in NUMBERS
        }
        self._before = {
            argument.name: self.arguments[argument.name].clone()
            for op in case.launches
            for argument in _schema(op)
            if argument.alias_info is not None and argument.name in start
        }

    def ours(self) -> Run:
        """Begin afresh; return what launches the ops."""
        for name, value in self._before.items():
            self.arguments[name].copy_(value)
        for name in self.arguments.keys() - self._start.keys() - _COMMON.keys():
            self.arguments[name].fill_(_poison(self.arguments[name].dtype))
        values = self.arguments | NUMBERS
        launches = [
            (getattr(self._backend, op), [values[name] for name in argument_names(op)])
            for op in self.case.launches
        ]
        results = tuple(self.arguments[name] for name in self.case.results)

        def run() -> Tensors:
            for launch, arguments in launches:
                launch(*arguments)
            return results

        return run

    def unfused(self) -> Run:
        """Return what does the same in plain torch."""
        known = _known_to(self.case, self._start)
        return lambda: self.case.unfused(**known)

    def error_of_ours(self, answer: Tensors) -> float:
        """Return the relative error of what `ours` returned, whose sums are partial."""
        pairs = zip(self.case.results, answer, strict=True)
        return self.error(tuple(t.sum(-1) if "P" in SHAPES[name] else t for name, t in pairs))

    def error(self, answer: Tensors) -> float:
        """Return the largest relative error, in norm, of an answer's tensors; NaN if one is."""
        errors = [
            float(torch.linalg.vector_norm(got - right) / torch.linalg.vector_norm(right))
            for got, right in zip(_answer(answer), self.expected, strict=True)
        ]
        return math.nan if any(map(math.isnan, errors)) else max(errors)


def argument_names(op: str) -> list[str]:
    """Return the names of an op's arguments in order."""
    return [argument.name for argument in _schema(op)]


def _schema(op: str) -> list[torch.Argument]:
    arguments: list[torch.Argument] = getattr(
        torch.ops.tritonimplicit, op
    ).default._schema.arguments
    return arguments


def _poison(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else 99  # a status that does not exist


def _answer(tensors: Tensors) -> Tensors:
    return tuple(tensor.double().flatten() for tensor in tensors)


def _known_to(case: Case, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `case.unfused` takes; of a single system without the batch's dimension."""
    known = {}
    for name in inspect.signature(case.unfused).parameters:
        value, batch = start[name], SHAPES[name].split(", ").index("B")
        known[name] = value.select(batch, 0) if value.shape[batch] == 1 else value
    return known


def _argument(
    name: str,
    start: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return an op's tensor: with its start, or a common value, or else poisoned."""
    shape = shape_of(name, sizes)
    own = dtype_of(name, dtype)
    if name not in start:
        return torch.full(shape, _COMMON.get(name, _poison(own)), dtype=own, device=device)
    if "P" not in SHAPES[name]:
        return start[name].to(own, copy=True)
    sums = torch.zeros(shape, dtype=own, device=device)
    sums[..., :1] = start[name]
    return sums
