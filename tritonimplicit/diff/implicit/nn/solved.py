"""Modules whose parameters are leaves for a solver, and solutions with a graph for all others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tritonimplicit.diff.implicit.nn.meta import MetaGradientModule

if TYPE_CHECKING:
    from typing_extensions import Self


class SolvedModule(MetaGradientModule):
    """A module that keeps, for each solution among its parameters, the leaf that it stands for.

    The leaves are the tensors that an optimiser made before the first solve knows.
    """

    def _issue(self, solved: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Put solutions in the place of the leaves that the solver worked on."""
        pairs = vars(self)["_issued"] = tuple(solved)
        _exchange(self, {id(leaf): solution for solution, leaf in pairs})

    def _take_back(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Put the leaves back, with the solutions' values in memory of their own."""
        issued: tuple[tuple[Tensor, Tensor], ...] = vars(self).pop("_issued", ())
        with torch.inference_mode(False):  # no leaf can do with the memory of an inference tensor
            for solution, leaf in issued:
                leaf.grad = None
                leaf.data = solution.detach().clone()
        _exchange(self, {id(solution): leaf for solution, leaf in issued})
        return issued

    def _take_back_detached(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Put back the leaves of solutions without a graph, and return the other solutions."""
        return tuple(pair for pair in self._take_back() if pair[0].grad_fn is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Torch converts leaves in place; a solution is replaced, so that its graph goes on.
        issued = self._take_back_detached()
        super()._apply(fn, recurse)
        with torch.enable_grad():
            self._issue((fn(solution), leaf) for solution, leaf in issued)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for solution, _ in vars(self).get("_issued", ()):
            if id(solution) not in memo:  # a copy is no part of the graph
                memo[id(solution)] = solution.detach().clone()
        duplicate = memo[id(self)] = object.__new__(type(self))
        duplicate.__setstate__(copy.deepcopy(vars(self), memo))
        return duplicate

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._issue(self._take_back_detached())


def _exchange(module: nn.Module, tensors: dict[int, Tensor]) -> None:
    """Put tensors in the place of the parameters with these ids, wherever they occur."""
    for owner in module.modules():
        for name, param in owner._parameters.items():
            if param is not None and id(param) in tensors:
                owner._parameters[name] = tensors[id(param)]  # type: ignore[assignment]
