"""Why we lose where we lose: what profiles of the cases have shown."""

from __future__ import annotations

UNKNOWN = "not looked into yet"

CAUSES: tuple[tuple[str, str, str], ...] = ()
"""Beginnings of a case's and of a provider's name, and the cause; the first that fits is told."""


def cause(case: str, provider: str) -> str:
    """Why we lose this case to this provider."""
    fitting = (
        why for begins, who, why in CAUSES if case.startswith(begins) and provider.startswith(who)
    )
    return next(fitting, UNKNOWN)
