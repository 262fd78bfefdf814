"""Writes the report: docs/benchmarks.md, its pictures, and the README's short table."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from bench import markdown
from bench.results import Report

BEGIN, END = "<!-- benchmarks: written by `python -m bench report` -->", "<!-- /benchmarks -->"


def write(report: Report, source: Path, root: Path) -> list[Path]:
    """The files that were written, below `root`; pictures only where matplotlib is installed.

    Those of another device than the CPU have its name, and the README's table is the CPU's.
    """
    device = report.environment["device"]
    suffix = "" if device == "cpu" else f"-{device}"
    written, images = [], root / "docs" / "images"
    plots: list[str] = []
    if find_spec("matplotlib"):
        from bench.plots import draw

        plots = draw(report, images, suffix)
        written += [images / plot for plot in plots]
    page = root / "docs" / f"benchmarks{suffix}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    beside = [f"images/{plot}" for plot in plots]
    page.write_text(markdown.page(report, f"bench/results/{source.name}", beside), "utf-8")
    written.append(page)
    readme = root / "README.md"
    if readme.exists() and not suffix:
        text = readme.read_text("utf-8")
        readme.write_text(with_table(text, markdown.short_table(report)), "utf-8")
        written.append(readme)
    return written


def with_table(text: str, table: str) -> str:
    """`text` with the table between its marks. Raises ValueError where there are none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no {BEGIN} and {END} for the short table.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
