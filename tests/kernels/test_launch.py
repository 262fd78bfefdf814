"""Launches: a kept form is started just as Triton would start it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is a dependency on Linux only")

from tests.kernels import launch_cost  # noqa: E402
from tests.kernels.offline import (  # noqa: E402
    Launches,
    kernel_called,
    launches_written_down,
)
from tests.kernels.problems import CG, DTYPES, cg  # noqa: E402
from tests.kernels.test_triton import assert_same_bits  # noqa: E402
from tools.op_arguments import arguments  # noqa: E402
from tritonimplicit_kernels import backend, ops  # noqa: E402
from tritonimplicit_kernels import triton as kernels  # noqa: E402
from tritonimplicit_kernels.triton import launch as launching  # noqa: E402
from tritonimplicit_kernels.triton import start as starting  # noqa: E402

compiles = pytest.mark.skipif(
    kernels.INTERPRETED, reason="compiles, which the interpreter's process can't"
)
gpu = pytest.mark.gpu


@pytest.fixture
def launches() -> Iterator[Launches]:
    with launches_written_down() as seen:
        yield seen


def some(op: str, dtype: torch.dtype = torch.float32, **sizes: int) -> list[Tensor | int]:
    return list(arguments(op, dtype, **({"batch": 2, "ld": 64, "partials": 2} | sizes)).values())


def run(op: str, args: list[Tensor | int]) -> None:
    getattr(kernels, op)(*args)


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Compare launches: tensors by identity."""
    *front, args = one
    *other_front, other_args = other
    return front == other_front and all(
        a is b if isinstance(a, Tensor) else a == b for a, b in zip(args, other_args, strict=True)
    )


@compiles
@pytest.mark.parametrize("op", ops.SCHEMAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kept_form_is_launched_as_triton_does(
    launches: Launches, op: str, dtype: torch.dtype
) -> None:
    args = some(op, dtype)
    run(op, args)
    by_triton = launches.take()
    run(op, args)
    assert same(launches.take(), by_triton)
    assert launches.by_triton == 1


@compiles
def test_other_sizes_and_tensors_use_the_kept_form(launches: Launches) -> None:
    run("cg_step", some("cg_step"))
    form = launches.take()[4]
    args = some("cg_step", batch=3, ld=4096, partials=5)
    run("cg_step", args)
    kept = launches.take()
    assert kept[:3] == (15, 1, 1) and kept[4] is form and launches.by_triton == 1
    starting._forms.clear()
    run("cg_step", args)
    assert same(launches.take(), kept)


@compiles
def test_what_a_form_depends_on_is_told_apart(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(at: int, value: Tensor | int) -> list[Tensor | int]:
        return [value if k == at else arg for k, arg in enumerate(some("cg_step"))]

    unaligned = torch.zeros(9, dtype=torch.float64)[1:].view(2, 2, 2)
    kinds = {
        "plain": some("cg_step"),
        "vectors' dtype": some("cg_step", torch.float64),
        "dots' dtype": change(4, torch.zeros(2, 2, 2)),  # wrong, but compiled for what it is
        "dots unaligned": change(4, unaligned),
    }
    forms = {}
    for name, args in kinds.items():
        run("cg_step", args)
        forms[name] = launches.take()[4]
    monkeypatch.setattr(launching, "_WARPS", 4)
    run("cg_step", kinds["plain"])
    forms["warps"] = launches.take()[4]
    monkeypatch.undo()
    assert len(set(map(id, forms.values()))) == len(forms) == len(launches.compiled)
    for name, args in kinds.items():
        run("cg_step", args)
        assert launches.take()[4] is forms[name], name
    assert launches.by_triton == len(forms) + 1  # once more for what is not aligned


@compiles
def test_each_device_and_stream_is_its_own(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, args = kernel_called("_cg_dots_kernel"), (*some("cg_dots"), 4, 2)
    forms = []
    for device, stream in [(0, 11), (1, 12), (0, 13), (1, 14)]:
        monkeypatch.setattr(launches.driver, "get_current_device", lambda device=device: device)
        monkeypatch.setattr(launches.driver, "get_current_stream", lambda _, stream=stream: stream)
        starting.start(kernel, device, 4, args, (256, 2048), 8)
        launch = launches.take()
        assert launch[3] == stream
        forms.append(launch[4])
    assert forms[0] is forms[2] and forms[1] is forms[3] and forms[0] is not forms[1]
    assert launches.by_triton == 2


@compiles
def test_what_was_compiled_and_not_launched_is_not_kept(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = some("cg_dots")
    options = {"grid": (4,), "num_warps": 8, "enable_fp_fusion": False}
    kernel_called("_cg_dots_kernel").warmup(*args, 4, 2, 256, 2048, **options)
    assert not launches.made and not launches.compiled and not starting._forms
    run("cg_dots", args)
    assert launches.take() and len(starting._forms) == 1
    starting._forms.clear()
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: None)
    run("cg_dots", args)  # as where a hook takes over from Triton's compiler
    assert not launches.made and not starting._forms


@compiles
def test_where_forms_are_not_kept_every_launch_is_tritons() -> None:
    with launches_written_down(keep=False) as launches:
        for _ in range(2):
            run("cg_dots", some("cg_dots"))
            launches.take()
    assert launches.by_triton == 2


@compiles
def test_what_launches_cost_the_host_can_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_cost, "CALLS", 2)
    launch_cost.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(launch_cost.OPS)


# --- On a GPU -------------------------------------------------------------------------------------


def step_of(count: int = 2) -> CG:
    return cg(3, 2500, torch.float32, count).to("cuda")


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_forms", {})


@gpu
@pytest.mark.usefixtures("forgotten")
def test_the_next_launch_writes_what_the_first_did() -> None:
    ours = backend("triton", "cuda", torch.float32)
    first, second = step_of(), step_of()
    first.launch(ours)
    assert len(starting._forms) == (2 if starting._KEEPS else 0)
    second.launch(ours)
    assert_same_bits(first.to("cpu"), second.to("cpu"))


@gpu
@pytest.mark.usefixtures("forgotten")
def test_an_unaligned_tensor_between_aligned_ones() -> None:
    ours = backend("triton", "cuda", torch.float32)
    aligned, unaligned = step_of(), step_of()
    dots = torch.zeros(1 + unaligned.dots.numel(), dtype=torch.float64, device="cuda")
    unaligned.dots = dots[1:].view_as(unaligned.dots)
    for step in (aligned, unaligned, step_of()):
        step.launch(ours)
        assert_same_bits(step.to("cpu"), aligned.to("cpu"))


@gpu
@pytest.mark.usefixtures("forgotten")
def test_a_kept_form_runs_on_the_current_stream() -> None:
    """Work enqueued before it, on a stream of its own, is seen: else it would read zeros."""
    ours, expected = backend("triton", "cuda", torch.float32), step_of()
    expected.launch(ours)
    for _ in range(2):
        step, source = step_of(), step_of()
        for vector in (step.r, step.p, step.ap):
            vector.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10**7)
            for name in ("r", "p", "ap"):
                getattr(step, name).copy_(getattr(source, name))
            step.launch(ours)
        torch.cuda.synchronize()
        assert_same_bits(step.to("cpu"), expected.to("cpu"))


@gpu
@pytest.mark.usefixtures("forgotten")
def test_a_kept_form_is_captured_in_a_graph() -> None:
    ours, expected, step = backend("triton", "cuda", torch.float32), step_of(), step_of()
    expected.launch(ours)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.launch(ours)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(step.to("cpu"), expected.to("cpu"))


@gpu
@pytest.mark.usefixtures("forgotten")
def test_each_gpu_has_forms_of_its_own() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ours, steps = backend("triton", "cuda", torch.float32), [step_of().to("cpu")]
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        step = steps[0].to(device)
        step.launch(ours)
        steps.append(step.to("cpu"))
    for step in steps[2:]:
        assert_same_bits(step, steps[1])
