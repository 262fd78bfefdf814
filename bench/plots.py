"""Results as pictures, for the report."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.case import OURS
from bench.results import CaseResult, Report

COLOURS = {
    OURS: "C0",
    "TorchOpt": "C1",
    "linear_operator": "C2",
    "JAXopt": "C3",
    "hypertorch": "C4",
    "plain torch": "C7",
}
STYLES = {"Neumann": "--", "fixed point": "--", "unrolled": ":"}
"""Of what a provider does, where it does several things."""

Lines = dict[str, list[tuple[float, float]]]
"""Points (x, y) of each provider."""


def draw(report: Report, folder: Path, suffix: str) -> list[str]:
    """Write a file for each picture that the results suffice for; returns their names."""
    from matplotlib.figure import Figure

    drawn = []
    for name, panels in PICTURES.items():
        found = list(panels(report))
        if not found:
            continue
        figure = Figure(figsize=(4.4 * len(found), 3.6), layout="constrained")
        for axes, fill in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
            fill(axes)
            axes.spines[["top", "right"]].set_visible(False)
        folder.mkdir(parents=True, exist_ok=True)
        drawn.append(f"{name}{suffix}.png")
        figure.savefig(folder / drawn[-1], dpi=100)
    return drawn


Panel = Callable[[Any], None]


def _growth(report: Report) -> Iterator[Panel]:
    for prefix, label in (
        ("scaling/size-", "elements"),
        ("scaling/leaves-", "leaves"),
        ("scaling/batch-", "systems"),
        ("batched/maml-cg-", "tasks (iMAML)"),
    ):
        lines = _by_number(report, prefix)
        if any(len(points) > 1 for points in lines.values()):  # a point shows no growth
            yield _lines(lines, f"20 CG iterations by {label}", label, "seconds")


def _by_number(report: Report, prefix: str) -> Lines:
    lines: Lines = defaultdict(list)
    for case in report.cases:
        if case.name.startswith(prefix):
            number = float(case.name.removeprefix(prefix))
            for row in case.rows:
                if row.median is not None:
                    lines[re.sub(", a loop|, vmap", "", row.provider)].append((number, row.median))
    return lines


def _by_iteration(report: Report) -> Iterator[Panel]:
    for case in report.cases:
        if case.name.startswith("hyperparameter/"):
            lines: Lines = {}
            for row in case.rows:
                points = [(float(k.removeprefix("k = ")), v) for k, v in row.figures.items() if v]
                if points:
                    lines[row.provider] = points
            title = f"{case.name.split('/')[1]}: error of the hypergradient"
            yield _lines(lines, title, "iterations", "relative error", log_x=False)


def _lines(lines: Lines, title: str, x: str, y: str, log_x: bool = True) -> Panel:
    def fill(axes: Any) -> None:
        for provider, points in lines.items():
            width = 2.5 if provider == OURS else 1.2
            xs, ys = zip(*sorted(points), strict=True)
            colour = COLOURS.get(provider.split(",")[0])
            style = STYLES.get(provider.partition(", ")[2], "-")
            axes.plot(xs, ys, style, marker=".", color=colour, label=provider, linewidth=width)
        axes.set(title=title, xlabel=x, ylabel=y, yscale="log")
        if log_x:
            axes.set_xscale("log")
        axes.legend(frameon=False, fontsize="small")

    return fill


def _equilibria(report: Report) -> Iterator[Panel]:
    cases = {case.name: case for case in report.cases}
    for model in ("conv", "multiscale", "lm"):
        case = cases.get(f"deq/backward-{model}-1e-3-worst")
        if case is not None:
            yield _bars(case, f"{model}: backward to 1e-3")


def _bars(case: CaseResult, title: str) -> Panel:
    rows = case.rows[::-1]

    def fill(axes: Any) -> None:
        labels = [row.provider.replace(OURS, "ours") for row in rows]
        colours = ["C0" if row.provider.startswith(OURS) else "C7" for row in rows]
        axes.barh(labels, [1e3 * (row.median or 0.0) for row in rows], color=colours)
        for place, row in enumerate(rows):
            if row.median is None:
                axes.text(0, place, f" {row.remark.split(':')[0]}", va="center", fontsize="small")
            elif row.matvecs is not None:
                axes.text(1e3 * row.median, place, f" {row.matvecs}", va="center", fontsize="small")
        axes.set(title=title, xlabel="ms; products beside the bar")

    return fill


PICTURES: dict[str, Callable[[Report], Iterator[Panel]]] = {
    "bench-deq": _equilibria,
    "bench-scaling": _growth,
    "bench-hyperparameter": _by_iteration,
}
