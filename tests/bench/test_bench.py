"""The benchmark program: what is right, timed and counted; no time is judged."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.__main__ import main
from bench.batched import backward, data
from bench.case import (
    OURS,
    PLAIN,
    Absent,
    Entry,
    MemoryGoal,
    Problem,
    ProductGoal,
    Setting,
    SpeedGoal,
)
from bench.hypergradient import data as network_data
from bench.imaml import entries, root_backward
from bench.libraries import PEERS, library
from bench.memory import Diagonal
from bench.networks import NETWORKS
from bench.peak import peak_and_calls, peak_bytes
from bench.registry import CASES, select
from bench.results import Report
from bench.runner import MIN_ROUNDS, PRODUCTS, measure, relative_error
from tritonimplicit.linear_solve import solve_cg

CPU = torch.device("cpu")
QUICK = Setting(CPU, quick=True)
RIGHT = torch.tensor([3.0, 4.0], dtype=torch.float64)


def always(*answer):
    return lambda: lambda: answer


def problem(*entries, goal=None, vector_bytes=None):
    goals = [] if goal is None else [goal]
    return Problem("a test", (RIGHT,), 1e-3, entries, goals=goals, vector_bytes=vector_bytes)


def rows_of(problem):
    return {row.provider: row for row in measure("a/test", problem, QUICK).rows}


@pytest.mark.gpu
def test_leaves_are_copied_or_read_in_place(tmp_path):
    assert main(["run", "leaves", "--quick", "--device", "cuda", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    for case in Report.load(file).cases:
        assert [row.provider for row in case.rows] == ["copied into rows", "read in place"]
        assert all(row.error < case.tolerance and row.rounds for row in case.rows)


def test_list_names_every_case(capsys):
    assert main(["list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [case.name for case in CASES]
    assert len(set(listed)) == len(listed)


def test_a_tiny_case_runs_and_is_reported(tmp_path, capsys):
    assert main(["run", "steps/cg-1e5", "--quick", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    (case,) = Report.load(file).cases
    assert [row.provider for row in case.rows] == [OURS, PLAIN]
    for row in case.rows:
        assert row.rounds == 7
        assert 0 < row.p20 <= row.median <= row.p80
        assert row.error < case.tolerance < 1e-4
    environment = json.loads(file.read_text())["environment"]
    assert environment["threads"] == torch.get_num_threads()
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    capsys.readouterr()
    assert main(["show", str(file)]) == 0
    assert "steps/cg-1e5" in capsys.readouterr().out


def test_tables_without_rich(tmp_path, capsys, monkeypatch):
    assert main(["run", "steps/cg-1e5", "--quick", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    monkeypatch.setattr("bench.tables.find_spec", lambda name: None)
    capsys.readouterr()
    assert main(["show", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(PLAIN) for line in lines)


def test_an_unknown_case_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["run", "no-such-case"])
    assert "no-such-case" in capsys.readouterr().err


def test_a_family_is_all_of_its_cases():
    assert [case.name for case in select(["memory"])] == [
        "memory/cg",
        "memory/normal_cg",
        "memory/neumann",
    ]


def test_a_quick_run_has_what_is_brief_and_what_is_named():
    named = select(["scaling/batch-4", "hyperparameter"], quick=True)
    assert [case.name for case in named] == [
        "hyperparameter/ridge",
        "hyperparameter/logistic",
        "scaling/batch-4",
    ]
    brief = select([], quick=True)
    assert {case.family for case in brief} == {case.family for case in CASES}
    assert len(brief) < len(select([])) == len(CASES)


@pytest.mark.parametrize(
    "wrong",
    [RIGHT * 1.002, RIGHT * math.nan, RIGHT[:1], RIGHT[None]],
    ids=["far", "nan", "short", "shape"],
)
def test_a_wrong_answer_gets_no_time(wrong):
    rows = rows_of(problem(Entry(OURS, always(RIGHT * 1.0005)), Entry("peer", always(wrong))))
    assert rows["peer"].median is None
    assert rows["peer"].remark.startswith("wrong answer")
    assert rows[OURS].median > 0
    assert rows[OURS].error == pytest.approx(5e-4)


def test_an_answer_that_turns_wrong_gets_no_time():
    answers = iter([RIGHT] * 6)
    turns = Entry("peer", lambda: lambda: (next(answers, 2 * RIGHT),))
    rows = rows_of(problem(Entry(OURS, always(RIGHT)), turns))
    assert rows["peer"].median is None
    assert rows["peer"].error == pytest.approx(1.0)


def test_a_provider_that_fails_or_is_missing_is_named():
    def fails():
        raise NotImplementedError("no such solver")

    rows = rows_of(
        problem(Entry(OURS, always(RIGHT)), Entry("broken", fails), Absent("missing", "why"))
    )
    assert rows["broken"].remark == "failed: NotImplementedError: no such solver"
    assert rows["missing"].remark == "why"
    assert rows["broken"].median is rows["missing"].median is None


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_not_installed_is_absent(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PEERS[name].module.split(".")[0], None)
    monkeypatch.setitem(sys.modules, PEERS[name].module, None)
    absent = library(name)
    assert isinstance(absent, Absent)
    assert absent.reason.startswith("not installed")


def test_providers_take_turns():
    turns = []

    def noted(name):
        def prepare():
            turns.append(name)
            return lambda: (RIGHT,)

        return Entry(name, prepare)

    rows_of(problem(noted("a"), noted("b")))
    assert turns == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 7


@pytest.mark.parametrize(("goal", "verdict"), [(1.0, "missed"), (3.0, "met")])
def test_a_memory_goal_is_judged(goal, verdict):
    # x + 1 and, while that is alive, its double: two vectors.
    entry = Entry(OURS, lambda: lambda: ((RIGHT + 1).mul(2) / 2 - 1,))
    result = measure(
        "a/test", problem(entry, goal=MemoryGoal(goal), vector_bytes=RIGHT.nbytes), QUICK
    )
    assert result.goal.endswith(f"{verdict}, 2.00")


def test_a_speed_goal_against_who_is_not_there_is_not_measured():
    goal = SpeedGoal("peer", 2.0)
    rows = problem(Entry(OURS, always(RIGHT)), Absent("peer", "not installed"), goal=goal)
    assert measure("a/test", rows, QUICK).goal.endswith("not measured")


def test_a_speed_goal_may_speak_of_another_of_our_rows():
    other = f"{OURS}, other"
    entries = [Entry(name, always(RIGHT)) for name in (OURS, other, "peer")]
    result = measure("a/test", problem(*entries, goal=SpeedGoal("peer", 1e9, other)), QUICK)
    median = {row.provider: row.median for row in result.rows}
    assert result.goal.startswith(f"{other}: 1e+09 times as fast as peer: missed")
    assert result.goal.endswith(f"{median['peer'] / median[other]:.2f} times")


def test_a_missed_speed_is_told_beside_that_of_the_products_alone():
    asked = Entry(OURS, always(RIGHT), matvecs=lambda: 7), Entry("peer", always(RIGHT))
    products = []
    known = replace(
        problem(*asked, goal=SpeedGoal("peer", 1e9)), product=lambda: lambda: products.append(1)
    )
    result = measure("a/test", known, QUICK)
    assert len(products) == MIN_ROUNDS * (1 + PRODUCTS)
    median = {row.provider: row.median for row in result.rows}
    bound = median["peer"] / (7 * result.product)
    assert result.goal.endswith(f" times ({bound:.2f} with nothing but its 7 products)")
    met = replace(known, goals=[SpeedGoal("peer", 1e-9)])
    assert measure("a/test", met, QUICK).goal.endswith(" times")


@pytest.mark.parametrize(("products", "verdict"), [(7, "met"), (6, "missed")])
def test_a_goal_of_products_is_judged(products, verdict):
    entry = Entry(OURS, always(RIGHT), matvecs=lambda: 7)
    result = measure("a/test", problem(entry, goal=ProductGoal(products)), QUICK)
    assert result.goal == f"at most {products} products: {verdict}, 7"


def test_an_entry_may_have_an_oracle_and_a_tolerance_of_its_own():
    other = Entry("other", always(2 * RIGHT), expected=(2 * RIGHT,))
    loose = Entry("loose", always(1.5 * RIGHT), tolerance=0.6)
    rows = rows_of(problem(Entry(OURS, always(RIGHT)), other, loose))
    assert rows["other"].error == 0
    assert rows["loose"].error == 0.5
    assert all(row.median for row in rows.values())


def test_figures_are_told_of_wrong_answers_too():
    def first(answer):
        return {"first": answer[0][0].item()}

    wrong = Entry("peer", always(2 * RIGHT), figures=first)
    rows = rows_of(problem(Entry(OURS, always(RIGHT), figures=first), wrong))
    assert rows[OURS].figures == {"first": 3.0}
    assert rows["peer"].figures == {"first": 6.0}
    assert rows["peer"].median is None


def test_relative_error_is_of_all_tensors_together():
    answer = torch.tensor([3.0]), torch.tensor([4.5])
    assert relative_error(answer, (RIGHT[:1], RIGHT[1:])) == 0.1


# --- What is counted ------------------------------------------------------------------------------

N = 100_000


def three_at_most():
    a = torch.ones(N)
    b = a + 1  # two
    c = (a * b).add_(b)  # three; in place is none
    del a, b
    return (c[1:].view(-1) * 2,)  # two; a view is none


def a_solve():
    matvec, b = Diagonal(torch.linspace(1, 2, N)), torch.ones(N)
    return lambda: (solve_cg(rtol=0.0, maxiter=5)(matvec, b),)


def test_peak_of_a_known_case():
    assert peak_bytes(three_at_most, CPU) == 3 * 4 * N


def test_calls_of_a_known_case():
    # ones, ones + 1, a * b, add_, slice, view, * 2.
    assert peak_and_calls(three_at_most, CPU) == (3 * 4 * N, 7)


def test_peak_leaves_out_what_was_there():
    before = torch.ones(N)
    assert peak_bytes(lambda: (before.add_(1), before.view(-1, 1)), CPU) == 0


@pytest.mark.parametrize("run", [three_at_most, a_solve()], ids=["known", "solve"])
def test_peak_is_the_allocators(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        answer = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    del answer
    # Buffers inside ops: scalars, and what a reduction keeps for each thread.
    assert peak_bytes(run, CPU) == pytest.approx(int(allocated.cumsum(0).max()), abs=4096)


@pytest.mark.parametrize(("solver", "products"), [("cg", 20), ("normal_cg", 41)])
def test_matvecs_of_our_solvers(solver, products):
    problem = network_data(NETWORKS["mlp"], CPU).double()
    ours = entries(problem, solver, 20, root_backward, peers=[])[0]
    assert ours.matvecs() == products  # in float64 rounding stops nothing; A^T b is one product


def test_matvecs_of_a_batch_are_counted_once():
    ours = entries(data(3, CPU).double(), "cg", 20, backward, peers=[])[0]
    assert ours.matvecs() <= 21
