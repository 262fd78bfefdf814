"""The registered ops: what torch asks of an op, and what a wrong argument gets."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tritonimplicit_kernels as kernels
from tests.kernels.bicgstab_problems import BiCGSTAB, bicgstab, pbicgstab
from tests.kernels.dense_problems import dense_cg
from tests.kernels.histories import op_arguments
from tests.kernels.problems import DTYPES, F64, Step, cg, neumann, pcg
from tools.op_arguments import arguments as made_up_arguments
from tritonimplicit_kernels import ops, reference

CG_STEP = ("x", "r", "p", "ap", "dots", "rr", "state", "threshold", "maxiter")
PCG_STEP = ("x", "r", "p", "ap", "d", "dots", "rr", "rz", "state", "threshold", "maxiter")
NEUMANN_STEP = ("x", "ax", "b", "alpha", "rr", "state", "threshold", "limit", "maxiter")
DENSE_CG = ("a", "rhs", "threshold", "maxiter", "solution", "state", "residual_sq")
BICGSTAB_SCALARS = ("shadow_dots", "ss", "half_dots", "alpha", "unit", "threshold", "state", "rho")
OUTPUTS = ("rr_out", "state_out", "residual_sq")
ARGUMENTS = {
    "cg_dots": ("p", "ap", "state", "dots"),
    "cg_step": CG_STEP + OUTPUTS,
    "pcg_dots": ("p", "ap", "d", "state", "dots"),
    "pcg_step": (*PCG_STEP, "rr_out", "rz_out", "state_out", "residual_sq"),
    "neumann_step": NEUMANN_STEP + OUTPUTS,
    "dense_cg": DENSE_CG,
    "multi_dot": ("w", "basis", "count", "state", "products"),
    "arnoldi_project": ("w", "basis", "count", "first", "state", "w_out", "second", "ww"),
    "arnoldi_step": (
        *("w", "basis", "count", "first", "second", "ww", "left", "column", "norm", "rr", "state"),
        *("threshold", "maxiter", *OUTPUTS),
    ),
    "anderson_dots": (
        *("image", "z", "z_before", "residual", "residuals", "moves", "slot", "count", "beta"),
        *("state", "row", "products", "squares"),
    ),
    "anderson_mix": (
        *("z", "residual", "moves", "coefficients", "count", "beta", "state", "z_out"),
    ),
    "bicgstab_dots": ("shadow", "v", "state", "shadow_dots"),
    "bicgstab_half_step": (
        *("r", "v", "shadow_dots", "rho", "rr", "state", "threshold", "limit", "maxiter"),
        *("alpha", "ss", "state_out", "residual_sq"),
    ),
    "bicgstab_half_dots": ("shadow", "s", "t", "state", "half_dots"),
    "bicgstab_step": ("x", "r", "p", "shadow", "v", "t", *BICGSTAB_SCALARS, "rr_out"),
    "pbicgstab_step": ("x", "r", "p", "shadow", "y", "z", "v", "t", *BICGSTAB_SCALARS, "rr_out"),
}
ON_HISTORIES = ("multi_dot", "arnoldi_project", "arnoldi_step", "anderson_dots", "anderson_mix")
MAKE = {
    "cg": cg,
    "pcg": pcg,
    "neumann": neumann,
    "dense": dense_cg,
    "bicgstab": bicgstab,
    "pbicgstab": pbicgstab,
}


def arguments(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    if op in ON_HISTORIES:
        return op_arguments(op, dtype)
    make = MAKE[op.split("_")[0]]
    step: Step = make(3, 40, dtype, 2)
    if op in ("cg_step", "pcg_step"):
        step.dots[:] = 1.0
    if isinstance(step, BiCGSTAB):
        step.launch(reference)  # so that there is what the launches hand on
    return {name: getattr(step, name) for name in ARGUMENTS[op]}


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_op(op: str, dtype: torch.dtype) -> None:
    registered = getattr(torch.ops.tritonimplicit, op).default
    names = tuple(argument.name for argument in registered._schema.arguments)
    assert names == ARGUMENTS[op]
    values = {
        name: v.nan_to_num() if isinstance(v, Tensor) else v
        for name, v in arguments(op, dtype).items()
    }
    torch.library.opcheck(registered, tuple(values.values()))


def test_every_op_is_tested() -> None:
    assert ARGUMENTS.keys() == ops.SCHEMAS.keys()


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_function_that_calls_an_op_is_one_graph(op: str, dynamic: bool) -> None:
    def twice(*values: Any) -> Tensor:
        getattr(kernels, op)(*values)
        getattr(kernels, op)(*values)
        return 2 * values[0]

    torch.compiler.reset()  # `twice` is one function to it, which has a limit of graphs
    compiled = torch.compile(twice, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    ours, eager = arguments(op), arguments(op)
    assert torch.equal(compiled(*ours.values()), twice(*eager.values()))
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, eager[name]), name


def test_a_loop_of_steps_compiles_to_the_same_solve() -> None:
    def three_steps(diagonal: Tensor, s: dict[str, Any]) -> None:
        for _ in range(3):
            s["ap"] = diagonal * s["p"]
            kernels.cg_dots(**{name: s[name] for name in ARGUMENTS["cg_dots"]})
            kernels.cg_step(**{name: s[name] for name in ARGUMENTS["cg_step"]})
            for name in ("rr", "state"):
                s[name], s[f"{name}_out"] = s[f"{name}_out"], s[name]

    diagonal, solves = torch.linspace(1, 2, 48).repeat(3, 1), []
    compiled_steps = torch.compile(three_steps, fullgraph=True, backend="aot_eager")
    for run in (three_steps, compiled_steps):
        step = cg(3, 40, torch.float32, 2)
        solves.append({field: getattr(step, field) for field in vars(step)})
        run(diagonal, solves[-1])
    eager, compiled = solves
    assert (eager["state"][1] == torch.tensor([3, 4, 5])).all()
    for name, value in eager.items():
        if isinstance(value, Tensor):
            assert torch.equal(compiled[name], value), name


@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_fake_call_checks_and_does_nothing(op: str) -> None:
    given = arguments(op)
    with FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        assert getattr(kernels, op)(**fakes) is None
        for name, value in fakes.items():
            if isinstance(value, Tensor):
                with pytest.raises((TypeError, ValueError), match="must be"):
                    getattr(kernels, op)(**fakes | {name: value.new_empty(7)})


@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_op_is_the_backends_function(op: str) -> None:
    ours, theirs = arguments(op), arguments(op)
    assert getattr(kernels, op)(**ours) is None
    getattr(kernels.backend("reference", "cpu", torch.float32), op)(*theirs.values())
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_op_takes_no_systems(op: str) -> None:
    tensors = made_up_arguments(op, torch.float32, batch=0, ld=48, partials=2)
    assert getattr(kernels, op)(**tensors) is None


@pytest.mark.parametrize("op", ARGUMENTS)
def test_every_wrong_argument_is_named(op: str) -> None:
    for name, value in arguments(op).items():
        if not isinstance(value, Tensor):
            continue
        wrong = {
            "dtype": value.to(torch.bool),
            "one system more": value.new_ones(tuple(size + 1 for size in value.shape)),
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
    ("change", "message"),
    [
        (lambda a: a | {"x": a["x"].half()}, "x must be float32 or float64, not torch.float16"),
        (lambda a: a | {"x": a["x"][:, :40]}, r"ld a positive multiple of 16, not \(3, 40\)"),
        (lambda a: a | {"x": a["x"][0]}, r"x must be \(B, ld\)"),
        (lambda a: a | {"p": a["p"].double()}, "p must be torch.float32, not torch.float64"),
        (lambda a: a | {"dots": a["dots"][..., :0]}, "P from 1 to 256"),
        (lambda a: a | {"rr": a["rr"][:, :1]}, r"rr must be \(B, P\), here \(3, 2\), not \(3, 1\)"),
        (lambda a: a | {"state": a["state"].long()}, "state must be torch.int32"),
        (lambda a: a | {"r": a["r"].T.contiguous().T}, "r must be contiguous"),
        (lambda a: a | {"maxiter": 2**31}, "maxiter must be from 0 to 2147483647"),
        (lambda a: a | {"rr_out": a["rr"]}, "rr_out must have memory of its own"),
        (lambda a: a | {"state_out": a["state"]}, "state_out must have memory of its own"),
        (lambda a: a | {"r": torch.zeros(3 * 48 + 1)[1:].view(3, 48)}, "multiple of 16 bytes"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(change: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.cg_step(**change(arguments("cg_step")))


def test_what_a_preconditioner_adds_is_checked_too() -> None:
    given = arguments("pcg_step")
    with pytest.raises(ValueError, match="rz_out must have memory of its own"):
        kernels.pcg_step(**given | {"rz_out": given["rz"]})
    with pytest.raises(ValueError, match="d must start at a multiple of 16 bytes"):
        kernels.pcg_step(**given | {"d": torch.ones(3 * 48 + 1)[1:].view(3, 48)})


def test_backends_are_picked_and_refused() -> None:
    with pytest.raises(ValueError, match="'auto', 'reference', 'triton', not 'cuda'"):
        kernels.backend("cuda", "cpu", F64)
    with pytest.raises(TypeError, match=r"float32 or float64, not torch\.float16"):
        kernels.backend("auto", "cpu", torch.float16)
    assert kernels.backend("auto", "cpu", F64).name == "reference"
    assert kernels.backend("reference", torch.device("cpu"), F64).name == "reference"


def test_triton_is_never_replaced_in_silence() -> None:
    pytest.importorskip("triton", reason="triton is a dependency on Linux only")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        kernels.backend("triton", "cpu", F64)


def test_triton_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonimplicit_kernels.backends.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="triton, which is not installed"):
        kernels.backend("triton", "cuda", F64)
    assert kernels.backend("auto", "cuda", F64).name == "reference"


def test_triton_is_imported_only_when_needed() -> None:
    use = "import tritonimplicit_kernels as k, torch, sys; k.backend('auto', 'cpu', torch.float32)"
    path = [f"sys.path[:0] = {sys.path!r}", use, "assert 'triton' not in sys.modules"]
    subprocess.run([sys.executable, "-c", "import sys; " + "; ".join(path)], check=True)
