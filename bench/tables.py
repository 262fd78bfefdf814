"""Results as tables: by rich where it is installed, else as plain text."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from bench.results import CaseResult, Report, Row

COLUMNS = ("provider", "error", "median", "p20 – p80", "× ours", "matvecs", "peak", "remark")

_FILE_WIDTH = 140


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
    rows = [_cells(row, case.peak_unit) for row in case.rows]
    print()
    if find_spec("rich"):
        _rich(title, rows)
    else:
        _plain(title, rows)
    print(f"errors are relative, to float64; {case.tolerance:.0e} is right")
    if case.goal:
        print(f"goal: {case.goal}")


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _cells(row: Row, peak_unit: str) -> tuple[str, ...]:
    spread = (
        "" if row.p20 is None or row.p80 is None else f"{duration(row.p20)} – {duration(row.p80)}"
    )
    return (
        row.provider,
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.median is None else duration(row.median),
        spread,
        "" if row.relative is None else f"{row.relative:.2f}",
        "" if row.matvecs is None else str(row.matvecs),
        "" if row.peak is None else f"{row.peak:.2f} {peak_unit}",
        row.remark,
    )


def _rich(title: str, rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(table)


def _plain(title: str, rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    print(title)
    for row in (COLUMNS, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
