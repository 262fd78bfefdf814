"""The registered ops on a basis or history: what a wrong argument gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tritonimplicit_kernels as kernels
from tests.kernels.histories import op_arguments as arguments


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("multi_dot", {"count": 0}, "count must be from 1 to 5, not 0"),
        ("arnoldi_step", {"count": 6}, "count must be from 1 to 5, not 6"),
        ("anderson_dots", {"slot": 3}, "slot must be from 0 to 2, not 3"),
        ("anderson_dots", {"slot": -1}, "slot must be from 0 to 2, not -1"),
        ("multi_dot", {"basis": torch.zeros(0, 3, 48)}, r"basis must be \(K, B, ld\) with K"),
        ("multi_dot", {"basis": torch.zeros(3, 48)}, r"basis must be \(K, B, ld\) with K"),
        ("arnoldi_step", {"left": torch.zeros(3, 5)}, "left must be torch.float64"),
        (
            "arnoldi_step",
            {"left": torch.zeros(3, 5, dtype=torch.float64)},
            r"left must be \(B, K \+ 1\), here \(3, 6\), not \(3, 5\)",
        ),
    ],
)
def test_a_wrong_argument_gets_a_sentence(op: str, change: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(kernels, op)(**arguments(op) | change)


@pytest.mark.parametrize(
    ("op", "name", "source"), [("arnoldi_project", "w_out", "w"), ("anderson_mix", "z_out", "z")]
)
def test_an_output_has_memory_of_its_own(op: str, name: str, source: str) -> None:
    given = arguments(op)
    with pytest.raises(ValueError, match=f"{name} must have memory of its own"):
        getattr(kernels, op)(**given | {name: given[source]})
