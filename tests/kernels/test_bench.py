"""The kernels' benchmark: what is right, timed, counted and written down; no time is judged."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import INTERPRETS
from tests.kernels.problems import Target
from tritonimplicit_kernels import ops
from tritonimplicit_kernels.bench import cases, machine, results
from tritonimplicit_kernels.bench.__main__ import main
from tritonimplicit_kernels.bench.cases import CASES, VECTORS, Size
from tritonimplicit_kernels.bench.clock import Times, in_turns
from tritonimplicit_kernels.bench.runner import Plan, measure
from tritonimplicit_kernels.bench.trial import Trial

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]
PLAN = Plan((640,), (1, 3), (torch.float32,), seconds=0.0, rounds=7, copied=640)
SMALL = Size(3, 640)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's plan is a tiny one."""
    monkeypatch.setattr(Plan, "on", classmethod(lambda cls, device, quick: PLAN))


def row_of(case: cases.Case, dtype: torch.dtype = torch.float32) -> results.Row:
    return measure(case, SMALL, dtype, CPU, PLAN, copied=1e9)


def test_every_op_is_measured() -> None:
    measured = {op for case in CASES for op in case.launches}
    assert ops.SCHEMAS.keys() == measured
    assert len(cases.BY_NAME) == len(CASES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("systems", [1, 3])
def test_both_forms_of_a_case_are_right(
    target: Target,
    case: cases.Case,
    systems: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tritonimplicit_kernels.bench.trial.backend", lambda *_: target.backend)
    trial = Trial(case, Size(systems, 640), dtype, torch.device(target.device))
    for _ in range(2):  # a second time as the first
        assert trial.error_of_ours(trial.ours()()) <= trial.tolerance < 1e-4
        assert trial.error(trial.unfused()()) <= trial.tolerance


def test_a_row_is_timed_and_its_bandwidth_told() -> None:
    row = row_of(cases.BY_NAME["cg_step"])
    assert (row.systems, row.n, row.passes, row.dtype, row.remark) == (3, 640, 7, "float32", "")
    for times in (row.ours, row.unfused):
        assert times.rounds == 7 and 0 < times.p20 <= times.p50 <= times.p80
    assert row.bandwidth == pytest.approx(7 * 3 * 640 * 4 / row.ours.p50)
    assert row.fraction == pytest.approx(row.bandwidth / 1e9)


def test_a_product_in_half_precision_is_fewer_bytes() -> None:
    row = row_of(cases.BY_NAME["cg_bf16"])
    assert row.error <= row.tolerance and row.passes == 9
    assert row.bandwidth == pytest.approx((7 * 4 + 2 * 2) * 3 * 640 / row.ours.p50)


@pytest.mark.parametrize("factor", [1.001, math.nan])
@pytest.mark.parametrize("who", ["ours", "unfused"])
def test_a_wrong_answer_gets_no_time(
    who: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(Trial, who)

    def wrong(self: Trial) -> object:
        run = right(self)
        return lambda: tuple(factor * tensor for tensor in run())

    monkeypatch.setattr(Trial, who, wrong)
    row = row_of(cases.BY_NAME["neumann_step"])
    assert row.ours is row.unfused is row.bandwidth is row.fraction is None
    assert row.remark == f"wrong answer, not timed: {who}"
    assert not (row.error if who == "ours" else row.unfused_error) <= row.tolerance


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_an_op_that_writes_nothing_is_wrong(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"tritonimplicit_kernels.reference.{op}", lambda *args: None)
    row = row_of(cases.BY_NAME[op])
    assert math.isnan(row.error) and row.ours is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in CASES if len(case.launches) == 1])
def test_each_result_is_awaited(case: cases.Case, dtype: torch.dtype) -> None:
    trial = Trial(case, SMALL, dtype, CPU)
    for index, name in enumerate(case.results):
        answer = [tensor.clone() for tensor in trial.ours()()]
        trial.ours()  # begins afresh: what an op has not written is not what it was
        answer[index] = trial.arguments[name]
        assert not trial.error_of_ours(tuple(answer)) <= trial.tolerance, name


def test_an_answer_that_turns_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = Trial.unfused, []

    def later_wrong(self: Trial) -> object:
        calls.append(1)
        run = right(self)
        return (lambda: tuple(2 * t for t in run())) if len(calls) == 2 + 7 else run

    monkeypatch.setattr(Trial, "unfused", later_wrong)
    row = row_of(cases.BY_NAME["cg_dots"])
    assert row.unfused is None and row.unfused_error == pytest.approx(1.0)


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Trial) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trial, "ours", fail)
    assert row_of(cases.BY_NAME["cg"]).remark == "not enough memory"


def test_contenders_take_turns_and_the_last_answer_is_checked() -> None:
    turns, checked = [], []

    def contender(name: str) -> object:
        return lambda: turns.append(name) or (lambda: (torch.tensor(len(turns)),))

    prepared = {name: contender(name) for name in "ab"}
    seconds = in_turns(
        prepared, CPU, 3, lambda name, answer: checked.append((name, int(answer[0])))
    )
    assert turns == ["a", "b"] * 3
    assert checked == [("a", 5), ("b", 6)]
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_percentiles() -> None:
    assert Times.of([float(k) for k in range(11)]) == Times(2.0, 5.0, 8.0, 11)


def test_sizes_are_multiples_of_16() -> None:
    assert Size.of(10**8, 1) == Size(1, 10**8)
    assert Size.of(10**4, 1024) == Size(1024, 16)
    assert Size.of(10**6, 64).n % 16 == 0


@pytest.mark.usefixtures("planned")
def test_the_program_writes_down_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--plot"]) == 0
    (file,) = tmp_path.glob("*.json")
    (picture,) = tmp_path.glob("*.png")
    assert picture.stem == file.stem and picture.stat().st_size > 10_000
    found = json.loads(file.read_text())
    assert found.keys() == {field.name for field in dataclasses.fields(results.Report)}
    assert found["copy_bandwidth"] > 0 and found["comparisons"] == []
    for fact in ("date", "commit", "device", "cpu", "cores", "threads", "load", "python"):
        assert fact in found["environment"]
    assert found["environment"]["versions"].keys() == {"torch", "triton", "numpy"}
    assert len(found["rows"]) == sum(len(list(PLAN.sizes(case))) for case in CASES)
    for row in found["rows"]:
        assert row.keys() == {field.name for field in dataclasses.fields(results.Row)}
        assert row["ours"].keys() == {"p20", "p50", "p80", "rounds"}
    shown = capsys.readouterr().out
    assert all(case.name in shown for case in CASES) and str(file) in shown


@pytest.mark.usefixtures("planned")
def test_the_program_fails_where_ours_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonimplicit_kernels.reference.cg_dots", lambda *args: None)
    assert main(["cg_dots", "--device", "cpu", "--out", str(tmp_path)]) == 1


def test_an_unknown_case_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["no-such-case", "--out", "nowhere"])
    assert "no-such-case" in capsys.readouterr().err


def test_a_commit_is_the_checkouts_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    git("init", "-q")
    (tmp_path / "known.py").touch()
    git("add", "known.py")
    git("commit", "-qm", "one")
    (tmp_path / "other.py").touch()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "other.py"))
    assert machine.commit() is None  # as where it is installed inside another's checkout
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "known.py"))
    assert len(machine.commit()) == 40
    (tmp_path / "known.py").write_text("changed")
    assert machine.commit().endswith("+changes")


def test_it_runs_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    """Without matplotlib, and without what the library beside it needs."""
    hidden = ("matplotlib", "optree", "rich", "tritonimplicit")
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}; sys.modules.update(dict.fromkeys({hidden!r}));"
        "from tritonimplicit_kernels.bench import runner, __main__ as program;"
        "tiny = runner.Plan((640,), (1,), (program.torch.float32,), 0.0, 7, 640);"
        "runner.Plan.on = classmethod(lambda *_: tiny);"
        f"sys.exit(program.main(['cg', '--device', 'cpu', '--out', {str(tmp_path)!r}]))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_the_presets_cover_what_they_promise() -> None:
    full, quick = (Plan.on(torch.device("cuda"), quick) for quick in (False, True))
    assert {10**4, 10**8} <= set(full.elements) and {1, 1024} <= set(full.systems)
    assert set(quick.elements) <= set(full.elements)
    for plan, limit in ((quick, 180), (Plan.on(CPU, True), 60)):
        rows = [list(plan.sizes(case)) for case in CASES]
        assert all(rows)
        # The seconds a row has, where a lap is short; the rest is for what is not timed.
        assert sum(map(len, rows)) * plan.seconds < limit / 2


# --- With Triton ----------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_passes_of_a_case_are_those_counted(case: cases.Case) -> None:
    from tools import ops_table

    counts = [ops_table.count(op, VECTORS) for op in case.launches]
    assert sum(count.passes for count in counts) == case.passes


def in_float32(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    from tritonimplicit_kernels.bench.choices import row_scales
    from tritonimplicit_kernels.bench.fp32_dots import fp32_dots

    scales = torch.stack([row_scales(v), row_scales(w)])
    sums = torch.full((2, v.shape[0], 2), math.nan, dtype=torch.float64, device=v.device)
    fp32_dots(v, w, scales, sums)
    return sums.sum(-1)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scaled_dots_in_float32(device: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    v, w = (torch.rand(3, 5008, generator=generator) * scale for _ in range(2))
    expected = torch.stack([(v.double() * w).sum(1), w.double().square().sum(1)])
    # All terms are positive: three roundings of each, and a sum of n in any order.
    bound = (3 + 5008**0.5) * torch.finfo(torch.float32).eps
    got = in_float32(v.to(device), w.to(device)).cpu()
    torch.testing.assert_close(got, expected, rtol=bound, atol=0)


def test_choices_are_compared(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter the times mean nothing; what both ways compute is checked all the same."""
    from tritonimplicit_kernels.bench import choices

    monkeypatch.setattr(choices, "_CALLS", 2)
    monkeypatch.setattr(choices, "_ROUNDS", 2)
    found = list(choices.comparisons(torch.device(device), PLAN))
    assert [set(each.times) for each in found] == [
        *([{"kept form", "triton"}] * 2),
        {"float64", "float32"},
    ]
    assert all(times.rounds == 2 and times.p50 > 0 for c in found for times in c.times.values())
    results.show_comparison(found[-1])


@pytest.mark.skipif(INTERPRETS, reason="compiles, which the interpreter's process can't")
def test_the_dots_in_float32_are_no_strawman() -> None:
    """They are compiled as the ops are: wide loads and addresses, no spills."""
    from tools import kernels_check as check
    from tools.addresses import narrow_addresses

    with check.compiling_only(check.TARGETS[1]) as compiled:
        in_float32(torch.ones(2, 4096), torch.ones(2, 4096))
    (binary,) = compiled.values()
    assert check.report(check.TARGETS[1], binary).faults() == []
    assert narrow_addresses(binary.asm["ttir"]) == []


@pytest.mark.gpu
@pytest.mark.usefixtures("planned")
def test_the_program_runs_on_a_gpu(tmp_path: Path) -> None:
    assert main(["--device", "cuda", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert found["environment"]["gpu"] and "driver" in found["environment"]
    assert not any(row["remark"] for row in found["rows"])
    assert len(found["comparisons"]) == 3
