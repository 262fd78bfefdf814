"""Counts the products with a matrix that a solver asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Matvec = Callable[[Any], Any]


@dataclass
class Products:
    """How many there were."""

    count: int = 0

    def counted(self, solve: Callable[..., Any]) -> Callable[[Matvec, Any], Any]:
        """`solve`, with its matvecs counted."""
        return lambda matvec, b: solve(_Counted(matvec, self), b)


class _Counted:
    def __init__(self, matvec: Any, products: Products):
        self._matvec, self._products = matvec, products

    def __call__(self, v: Any) -> Any:
        self._products.count += 1
        return self._matvec(v)

    @property
    def T(self) -> _Counted:
        return _Counted(self._matvec.T, self._products)
