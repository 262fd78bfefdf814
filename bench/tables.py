"""Results as tables: by rich where it is installed, else as plain text."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from bench.results import CaseResult, Report, Row

BEFORE = ("provider", "error")
AFTER = ("median", "p20 – p80", "× ours", "matvecs", "calls", "peak", "remark")

_FILE_WIDTH = 180


def show(report: Report) -> None:
    """Print what the run ran on, and a table for each case."""
    facts = dict(report.environment)
    versions = facts.pop("versions")
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    print(", ".join(f"{name} {value or 'absent'}" for name, value in versions.items()))
    for case in report.cases:
        show_case(case)


def show_case(case: CaseResult) -> None:
    """Print one table."""
    title = f"{case.name}: {case.about}"
    columns, rows = cells(case)
    print()
    if find_spec("rich"):
        _rich(title, columns, rows)
    else:
        _plain(title, columns, rows)
    print(footnote(case))
    if case.goal:
        print(f"goal: {case.goal}")


def footnote(case: CaseResult) -> str:
    """How to read the table."""
    facts = [case.compares] if case.compares else []
    facts.append(f"errors are {case.error_is}; {case.tolerance:.1e} is right")
    if case.product is not None:
        facts.append(f"one product alone takes {duration(case.product)}")
    if case.seconds is not None:
        facts.append(f"the case took {case.seconds:.1f} s")
    return "; ".join(facts)


def figures_of(case: CaseResult) -> tuple[str, ...]:
    """The names of all that any row tells besides."""
    return tuple(dict.fromkeys(name for row in case.rows for name in row.figures))


def cells(case: CaseResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table's columns and rows, as text."""
    figures = figures_of(case)
    rows = [_cells(row, figures, case.peak_unit) for row in case.rows]
    return (*BEFORE, *figures, *AFTER), rows


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def spread(row: Row) -> str:
    """The 20th and the 80th percentile."""
    if row.p20 is None or row.p80 is None:
        return ""
    return f"{duration(row.p20)} – {duration(row.p80)}"


def _cells(row: Row, figures: tuple[str, ...], peak_unit: str) -> tuple[str, ...]:
    return (
        row.provider,
        "" if row.error is None else f"{row.error:.1e}",
        *(f"{row.figures[name]:.5g}" if name in row.figures else "" for name in figures),
        "" if row.median is None else duration(row.median),
        spread(row),
        "" if row.relative is None else f"{row.relative:.2f}",
        "" if row.matvecs is None else str(row.matvecs),
        "" if row.calls is None else str(row.calls),
        "" if row.peak is None else f"{row.peak:.2f} {peak_unit}",
        row.remark,
    )


def _rich(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(table)


def _plain(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    print(title)
    for row in (columns, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
