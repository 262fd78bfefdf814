"""A run's results as a page of Markdown, and a short table of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.case import OURS
from bench.causes import MEANING, PROFILED, cause
from bench.registry import ABOUT
from bench.results import CaseResult, Report, Row
from bench.tables import duration, figures_of, spread

Cells = Sequence[str]

BRIEF = "**A brief run: some of the cases, smaller problems.**"


@dataclass(frozen=True)
class Short:
    """A line of the short table: what is done, in which case, against which peer."""

    what: str
    case: str
    peer: str


SHORT = (
    Short("iMAML hypergradient, MLP, CG", "hypergradient/mlp-cg-20", "TorchOpt"),
    Short("the same, normal CG", "hypergradient/mlp-normal_cg-20", "TorchOpt"),
    Short("32 MAML tasks, CG", "batched/maml-cg-32", "TorchOpt"),
    Short("DEQ backward to 1e-3, conv", "deq/backward-conv-1e-3-worst", "torchdeq, Broyden"),
    Short("the same, multi-scale", "deq/backward-multiscale-1e-3-worst", "torchdeq, Broyden"),
    Short("the same, language model", "deq/backward-lm-1e-3-worst", "torchdeq, Broyden"),
    Short("DEQ language model, a training step", "deq/training-lm", "torchdeq, ift=True"),
    Short("CG iteration, n = 1e7, without its matvec", "steps/cg-1e7", "plain torch"),
)


def page(report: Report, source: str, plots: Sequence[str]) -> str:
    """All of it; `source` is the file that it is made from, `plots` are files beside the page."""
    parts = [
        "# Benchmarks",
        f"Written by `python -m bench report` from `{source}`: change nothing here. How to run it "
        "and how an answer is judged is in [bench/README.md](../bench/README.md).",
        BRIEF if report.environment["quick"] else "",
        _machine(report),
        "ours/peer is the time of the row named `tritonimplicit` over that of the row at hand: "
        "below 1 we are faster, and it is **bold where we lose**. A wrong answer, or one that does "
        "not reach the residual, has no time.",
        *_section("## Goals", _goals(report)),
        *_section("## Where we lose", _losses(report)),
        *(f"![]({plot})" for plot in plots),
    ]
    for family, cases in itertools.groupby(report.cases, key=lambda case: case.name.split("/")[0]):
        parts += [f"## {family}", ABOUT.get(family, "")]
        for case in cases:
            parts += _case(case)
    return "\n\n".join(filter(None, parts)) + "\n"


def short_table(report: Report) -> str:
    """A few lines of it, for the README."""
    cases = {case.name: case for case in report.cases}
    lines: list[Cells] = []
    for short in SHORT:
        rows = {row.provider: row for row in cases[short.case].rows} if short.case in cases else {}
        ours, peer = rows.get(OURS), rows.get(short.peer)
        if ours is None or peer is None:
            continue
        lines.append((short.what, _time(ours), short.peer, _time(peer), _ratio(peer)))
    facts = report.environment
    where = [facts["cpu"], f"{facts['threads']} threads", f"torch {facts['versions']['torch']}"]
    if facts.get("gpu"):
        where.append(facts["gpu"])
    return (
        table(("", "ours", "peer", "peer's", "ours/peer"), lines)
        + f"\n\n{', '.join(where)}; medians; bold where we lose. All of it: "
        "[docs/benchmarks.md](docs/benchmarks.md)."
    )


def table(columns: Cells, rows: Iterable[Cells]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
    )


def losses(report: Report) -> Iterator[tuple[CaseResult, Row]]:
    """Each time that a peer was faster than our first row."""
    for case in report.cases:
        for row in case.rows:
            if not row.provider.startswith(OURS) and row.relative and row.relative < 1:
                yield case, row


def _machine(report: Report) -> str:
    facts = dict(report.environment)
    versions = {name: version for name, version in facts.pop("versions").items() if version}
    lines = [(name, str(value)) for name, value in facts.items() if value is not None]
    lines.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return table(("run on", ""), lines)


def _section(title: str, body: str) -> list[str]:
    return [title, body] if body else []


def _goals(report: Report) -> str:
    rows = [
        (case.name, *goal.rpartition(": ")[::2])
        for case in report.cases
        for goal in filter(None, case.goal.split("; "))
    ]
    return table(("case", "goal", ""), rows) if rows else ""


def _losses(report: Report) -> str:
    rows = [
        (case.name, row.provider, _ratio(row), cause(case.name, row.provider))
        for case, row in losses(report)
    ]
    if not rows:
        return ""
    words = dict.fromkeys(row[-1] for row in rows if row[-1] in MEANING)
    legend = [f"- {word}: {MEANING[word]}" for word in words]
    legend += ["", f"Profiled: cases of {', '.join(PROFILED)}. The others' causes are presumed."]
    return "\n".join([table(("case", "peer", "ours/peer", "cause"), rows), "", *legend])


def _case(case: CaseResult) -> list[str]:
    figures = figures_of(case)
    columns = (
        "",
        "error",
        *figures,
        "median",
        "p20 – p80",
        "ours/peer",
        "products",
        "calls",
        "peak",
        "",
    )
    rows = [
        (
            row.provider,
            "" if row.error is None else f"{row.error:.1e}",
            *(f"{row.figures[name]:.5g}" if name in row.figures else "" for name in figures),
            _time(row),
            spread(row),
            _ratio(row),
            "" if row.matvecs is None else str(row.matvecs),
            "" if row.calls is None else str(row.calls),
            "" if row.peak is None else f"{row.peak:.2f} {case.peak_unit}",
            row.remark,
        )
        for row in case.rows
    ]
    compares = f"Compared: {case.compares}. " if case.compares else ""
    alone = "" if case.product is None else f" One product alone takes {duration(case.product)}."
    return [
        f"### {case.name}",
        f"{case.about}. {compares}Errors are {case.error_is}; {case.tolerance:.1e} is right."
        + alone,
        table(columns, rows),
        f"Goal: {case.goal}." if case.goal else "",
    ]


def _time(row: Row) -> str:
    return "" if row.median is None else duration(row.median)


def _ratio(row: Row) -> str:
    """Of ours to a peer's time; none for what is ours."""
    if not row.relative or row.provider.startswith(OURS):
        return ""
    ratio = f"{1 / row.relative:.2f}"
    return f"**{ratio}**" if row.relative < 1 else ratio
