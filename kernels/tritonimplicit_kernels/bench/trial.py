"""One case at one size: its tensors, the check of an answer, and the two that are timed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from tritonimplicit_kernels import status
from tritonimplicit_kernels.backends import backend
from tritonimplicit_kernels.bench.cases import VECTORS, Case, Size
from tritonimplicit_kernels.bench.clock import Run, Tensors
from tritonimplicit_kernels.layout import PRODUCT, SHAPES, dtype_of, shape_of

_COMMON: Final = {"state": status.RUNNING, "threshold": 0.0, "limit": math.inf, "unit": 1.0}
_SLOT: Final = 2
NUMBERS: Final = {"maxiter": 1000, "count": VECTORS, "slot": _SLOT, "beta": 0.5}
_KNOWN_AS: Final = {
    "multi_dot": {"products": "first"},
    "arnoldi_step": {"w": "w_out"},
}
"""Arguments that have another name in the ops before or after, to which it is handed on."""
_WRITTEN: Final = {
    "basis": (0, VECTORS, 1),
    **dict.fromkeys(("residuals", "moves"), (0, _SLOT, 1)),
    **dict.fromkeys(("first", "second", "row", "products"), (0, 0, VECTORS)),
    "left": (-1, VECTORS, 1),
    "column": (-1, 0, VECTORS + 1),
}
"""What of an argument an op writes, where not all of it: dimension, start, length."""


class Trial:
    """Both contenders on the same numbers, drawn in float64 and then rounded to `dtype`."""

    def __init__(self, case: Case, size: Size, dtype: torch.dtype, device: torch.device):
        start = case.start(size, device)
        self.case = case
        answer = _answer(case.unfused(**_known_to(case, start)))
        self.expected = tuple(tensor.clone() for tensor in answer)  # some may be part of `start`
        # A result is a few roundings of numbers up to five times its size; sums of n products err
        # by sqrt(n) units where the roundings are independent.
        self.tolerance = (32 + size.n**0.5) * torch.finfo(dtype).eps
        dtypes = {name: dtype_of(name, dtype) for name in SHAPES}
        dtypes |= dict.fromkeys(PRODUCT, case.product or dtype)
        self._start = {
            name: value.to(dtypes[name] if name in PRODUCT else dtype)
            for name, value in start.items()
        }
        self._backend = backend("auto", device, dtype)
        names = [name for op in case.launches for name in argument_names(op)]
        sizes = _sizes(size, start) | {"P": self._backend.partial_count(size.n)}
        self.arguments = {
            name: _argument(name, start, sizes, dtypes[name], device)
            for name in names
            if name not in NUMBERS
        }
        self.bytes = _bytes(case, names, self.arguments)
        written = {name for op in case.launches for name in _written_by(op)} - _COMMON.keys()
        self._outputs = written - (start.keys() - _WRITTEN.keys())
        self._before = {name: self.arguments[name].clone() for name in written - self._outputs}

    def ours(self) -> Run:
        """Begin afresh; return what launches the ops."""
        for name, value in self._before.items():
            self.arguments[name].copy_(value)
        self._poison_outputs(self.arguments)
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
        """Begin afresh; return what does the same in plain torch."""
        self._poison_outputs(self._start)
        known = _known_to(self.case, self._start)
        return lambda: self.case.unfused(**known)

    def _poison_outputs(self, tensors: Mapping[str, Tensor]) -> None:
        for name in self._outputs & tensors.keys():
            _written(name, tensors[name]).fill_(_poison(tensors[name].dtype))

    def error_of_ours(self, answer: Tensors) -> float:
        """Return the relative error of what `ours` returned, whose sums are partial."""
        pairs = zip(self.case.results, answer, strict=True)
        parts = [(name, _written(name, tensor)) for name, tensor in pairs]
        return self.error(tuple(t.sum(-1) if "P" in SHAPES[name] else t for name, t in parts))

    def error(self, answer: Tensors) -> float:
        """Return the largest relative error, in norm, of an answer's tensors; NaN if one is."""
        errors = [
            float(torch.linalg.vector_norm(got - right) / torch.linalg.vector_norm(right))
            for got, right in zip(_answer(answer), self.expected, strict=True)
        ]
        return math.nan if any(map(math.isnan, errors)) else max(errors)


def argument_names(op: str) -> list[str]:
    """Return what an op's arguments are known by here, in order."""
    known_as = _KNOWN_AS.get(op, {})
    return [known_as.get(argument.name, argument.name) for argument in _schema(op)]


def _written_by(op: str) -> set[str]:
    pairs = zip(argument_names(op), _schema(op), strict=True)
    return {name for name, argument in pairs if argument.alias_info is not None}


def _written(name: str, tensor: Tensor) -> Tensor:
    """Return what an op writes of an argument, as a view."""
    return tensor.narrow(*_WRITTEN[name]) if name in _WRITTEN else tensor


def _schema(op: str) -> list[torch.Argument]:
    arguments: list[torch.Argument] = getattr(
        torch.ops.tritonimplicit, op
    ).default._schema.arguments
    return arguments


def _sizes(size: Size, start: Mapping[str, Tensor]) -> dict[str, int]:
    room = max((len(v) for name, v in start.items() if SHAPES[name] == "K, B, ld"), default=0)
    return {"B": size.systems, "ld": size.n, "n": size.n, "K": room, "K + 1": room + 1}


def _bytes(case: Case, names: Sequence[str], arguments: Mapping[str, Tensor]) -> int:
    """Return the bytes of all passes; a launch reads the product, if it takes it, once."""
    vector = arguments[names[0]]  # or a matrix, which a whole solve reads
    products = [arguments[name].nbytes for name in names if name in PRODUCT]
    return vector.nbytes * (case.passes - len(products)) + sum(products)


def _poison(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else 99  # a status that does not exist


def _answer(tensors: Tensors) -> Tensors:
    return tuple(tensor.double().flatten() for tensor in tensors)


def _known_to(case: Case, start: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
    """Return what `case.unfused` takes; of a single system without the batch's dimension."""
    known: dict[str, Tensor | float] = {}
    for name in inspect.signature(case.unfused).parameters:
        if name in NUMBERS:
            known[name] = NUMBERS[name]
            continue
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
    if name not in start:
        return torch.full(shape, _COMMON.get(name, _poison(dtype)), dtype=dtype, device=device)
    if "P" not in SHAPES[name]:
        return start[name].to(dtype, copy=True)
    sums = torch.zeros(shape, dtype=dtype, device=device)
    sums[: len(start[name]), ..., :1] = start[name]
    return sums
