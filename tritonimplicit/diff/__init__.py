"""Differentiation through solutions."""

from tritonimplicit.diff import implicit

__all__ = ["implicit"]
