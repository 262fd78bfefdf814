"""The registered ops on a basis or history: what torch asks of an op, and wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tritonimplicit_kernels as kernels
from tests.kernels.histories import Anderson, Arnoldi, anderson, arnoldi
from tests.kernels.problems import DTYPES

OPS = ("multi_dot", "arnoldi_project", "arnoldi_step", "anderson_dots", "anderson_mix")
NAMES = {
    "multi_dot": {"v": "w", "products": "first"},
    "arnoldi_step": {"w": "w_out"},
}
every_op = pytest.mark.parametrize("op", OPS)


def arguments(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    step: Arnoldi | Anderson = (anderson if op.startswith("anderson") else arnoldi)(
        3, 40, dtype, parts=2
    )
    schema = getattr(torch.ops.tritonimplicit, op).default._schema
    names = [argument.name for argument in schema.arguments]
    given = {name: getattr(step, NAMES.get(op, {}).get(name, name)) for name in names}
    return {
        name: value.nan_to_num(0.5) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_op(op: str, dtype: torch.dtype) -> None:
    values = arguments(op, dtype).values()
    torch.library.opcheck(getattr(torch.ops.tritonimplicit, op).default, tuple(values))


@every_op
def test_an_op_is_the_backends_function(op: str) -> None:
    ours, theirs = arguments(op), arguments(op)
    assert getattr(kernels, op)(**ours) is None
    getattr(kernels.backend("reference", "cpu", torch.float32), op)(*theirs.values())
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name


@every_op
def test_an_op_compiles_in_one_graph(op: str) -> None:
    ours, theirs = arguments(op), arguments(op)

    def doubled(tensors: dict[str, Any]) -> list[Tensor]:
        getattr(torch.ops.tritonimplicit, op)(*tensors.values())
        return [2 * v for v in tensors.values() if isinstance(v, Tensor)]

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(ours), doubled(theirs), strict=True):
        assert torch.equal(got, expected)


@every_op
def test_every_wrong_argument_is_named(op: str) -> None:
    for name, value in arguments(op).items():
        if not isinstance(value, Tensor):
            continue
        wrong = {
            "dtype": value.to(torch.float16),
            "one more of all": value.new_ones(tuple(size + 1 for size in value.shape)),
            "device": value.to("meta"),
            "strides": value.repeat_interleave(2, dim=-1)[..., ::2],
        }
        for what, instead in wrong.items():
            given = arguments(op) | {name: instead}
            if what == "device" and name == next(iter(given)):
                continue  # the first argument says which device is right
            with pytest.raises((TypeError, ValueError)) as caught:
                getattr(kernels, op)(**given)
            assert what == "device" or any(f"{n} must" in str(caught.value) for n in given), what


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
