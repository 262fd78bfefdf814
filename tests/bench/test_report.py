"""The report: what is bold, what is told of goals and losses, and the README's table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import causes, document, markdown
from bench.__main__ import RESULTS, _ours_is_right, main
from bench.case import OURS, Setting
from bench.machine import environment
from bench.registry import CASES
from bench.results import CaseResult, Report, Row

KNOWN = causes.CAUSES


@pytest.fixture
def report():
    import torch

    def case(name, *rows, goal=""):
        return CaseResult(name, "what it is", 1e-4, "MiB", list(rows), goal, "same iterations")

    def rows(peer, peers_median, provider_of_ours=OURS):
        ours = Row(provider_of_ours, 1e-7, 2.0, 1.5, 2.5, 1.0, 7, 13, 0.5)
        return ours, Row(peer, 2e-7, peers_median, 1.0, 4.0, peers_median / 2.0, 7)

    scaled = [
        case(f"scaling/size-{n}", *rows("TorchOpt", float(n) / 1e4)) for n in ("1e3", "1e4", "1e5")
    ]
    cases = [
        case("hypergradient/mlp-cg-20", *rows("TorchOpt", 3.0), goal="1.3 times: met, 1.50 times"),
        case(
            "deq/backward-lm-1e-3-worst",
            *rows("torchdeq, Broyden", 1.0),
            Row("torchdeq, default", 0.4, remark="not reached: not timed"),
            Row(f"{OURS}, BiCGSTAB", 1e-7, 1.0, 1.0, 1.0, 0.5, 7, figures={"cosine": 0.5}),
            goal="2.5 times as fast as torchdeq, Broyden: missed, 0.50 times; at most 16: met, 13",
        ),
        *scaled,
    ]
    return Report(environment(Setting(torch.device("cpu")).device, quick=False), cases)


def lines_with(text, word):
    return [line for line in text.splitlines() if word in line]


def test_a_ratio_is_bold_where_we_lose(report):
    page = markdown.page(report, "results.json", [])
    (won,) = lines_with(page.split("### hypergradient")[1].split("##")[0], "| TorchOpt |")
    assert "| 0.67 |" in won
    tables = page.split("### deq")[1]
    (lost,) = lines_with(tables, "| torchdeq, Broyden |")
    assert "| **2.00** |" in lost
    (ours,) = lines_with(tables, "BiCGSTAB")
    assert "**" not in ours
    assert "| 0.5 |" in ours
    (untimed,) = lines_with(tables, "torchdeq, default")
    assert "not reached: not timed" in untimed


def test_a_product_alone_is_told(report):
    known = replace(report, cases=[replace(report.cases[0], product=0.25)])
    assert "is right. One product alone takes 250 ms." in markdown.page(known, "results.json", [])
    assert "One product" not in markdown.page(report, "results.json", [])


def test_losses_are_listed_with_their_cause(report, monkeypatch):
    monkeypatch.setattr(causes, "CAUSES", (("deq/backward", "torchdeq", "calls"),))
    page = markdown.page(report, "results.json", [])
    losses = page.split("## Where we lose")[1].split("## hypergradient")[0]
    assert "| deq/backward-lm-1e-3-worst | torchdeq, Broyden | **2.00** | calls |" in losses
    assert f"- calls: {causes.MEANING['calls']}" in losses
    assert "BiCGSTAB" not in losses
    assert causes.UNKNOWN in losses  # scaling's
    assert all(why in causes.MEANING for _, _, why in KNOWN)
    assert "mlp-cg" not in losses


def test_goals_are_listed(report):
    goals = markdown.page(report, "results.json", []).split("## Goals")[1].split("##")[0]
    assert "| hypergradient/mlp-cg-20 | 1.3 times | met, 1.50 times |" in goals
    case = "| deq/backward-lm-1e-3-worst |"
    assert f"{case} 2.5 times as fast as torchdeq, Broyden | missed, 0.50 times |" in goals
    assert f"{case} at most 16 | met, 13 |" in goals


def test_the_short_table_names_cases_that_exist():
    assert {short.case for short in markdown.SHORT} <= {case.name for case in CASES}


def test_the_report_is_written(report, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    readme = root / "README.md"
    readme.write_text(f"before\n{document.BEGIN}\nstale\n{document.END}\nafter\n")
    file = report.save(tmp_path)
    assert main(["report", str(file), "--root", str(root)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{document.BEGIN}\n| ")
    assert text.endswith(f"{document.END}\nafter\n")
    assert "stale" not in text
    assert "| 2 s | TorchOpt | 3 s | 0.67 |" in text
    assert "| **2.00** |" in text
    page = (root / "docs" / "benchmarks.md").read_text()
    for picture in ("bench-deq.png", "bench-scaling.png"):
        assert f"![](images/{picture})" in page
        assert (root / "docs" / "images" / picture).stat().st_size > 10_000
    assert "bench-hyperparameter" not in page  # there is nothing to draw
    assert main(["report", str(file), "--root", str(root)]) == 0
    assert readme.read_text() == text


def test_each_device_has_its_page(report, tmp_path):
    def stored(device, quick, date):
        facts = {**report.environment, "device": device, "quick": quick, "date": date}
        return str(Report(facts, report.cases).save(tmp_path))

    files = [
        stored("cpu", False, "2026-01-01"),
        stored("cpu", True, "2026-01-02"),
        stored("cuda", True, "2026-01-03"),
        stored("cuda", True, "2026-01-04"),
    ]
    assert main(["report", *files, "--root", str(tmp_path)]) == 0
    on_cpu, on_cuda = ((tmp_path / "docs" / f"benchmarks{s}.md").read_text() for s in ("", "-cuda"))
    assert "2026-01-01" in on_cpu
    assert "2026-01-04" in on_cuda
    assert "brief run" in on_cuda
    assert "brief run" not in on_cpu
    assert "images/bench-deq-cuda.png" in on_cuda


@pytest.mark.parametrize(
    ("provider", "remark", "right"),
    [
        (OURS, "", True),
        (OURS, "not reached: not timed", False),
        (f"{OURS}, Neumann", "not reached: not timed", True),
        (f"{OURS}, Neumann", "wrong answer: not timed", False),
        (f"{OURS}, Neumann", "failed: ValueError", False),
        ("TorchOpt", "wrong answer: not timed", True),
    ],
)
def test_the_exit_status_is_of_wrong_answers_of_ours(provider, remark, right):
    case = CaseResult("a/test", "", 0.1, "MiB", [Row(OURS), Row(provider, remark=remark)])
    assert _ours_is_right(case) is right


def test_a_readme_without_marks_is_an_error(report):
    with pytest.raises(ValueError, match="has no"):
        document.with_table("a README", "a table")


def test_the_readme_has_the_marks():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert document.with_table(text, "a table").count("a table") == 1


def test_a_report_is_the_same_from_its_file(report, tmp_path):
    assert Report.load(report.save(tmp_path)).cases == report.cases


def test_stored_results_can_be_read():
    for file in RESULTS.glob("*.json"):
        assert Report.load(file).cases
