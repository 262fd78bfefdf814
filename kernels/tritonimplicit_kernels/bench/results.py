"""What a run found out: as JSON, and as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonimplicit_kernels.bench.clock import Times


@dataclass(frozen=True)
class Row:
    """One case at one size; None where there is nothing to say, `remark` then says why.

    Times are of one call of all the case's ops, in seconds. `bandwidth` is the vectors that it
    reads and writes, in bytes, over our median; `fraction` that over the measured copy's.
    """

    case: str
    dtype: str
    systems: int
    n: int
    passes: int
    tolerance: float
    error: float | None = None
    unfused_error: float | None = None
    ours: Times | None = None
    unfused: Times | None = None
    bandwidth: float | None = None
    fraction: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two ways to do one thing: seconds of one call."""

    about: str
    times: dict[str, Times]
    remark: str = ""


@dataclass(frozen=True)
class Record:
    """What a run found out on a machine, its fields kept as JSON."""

    environment: dict[str, Any]

    def save(self, folder: Path) -> Path:
        """Write to a new file in `folder`, named by date and device."""
        folder.mkdir(parents=True, exist_ok=True)
        date = self.environment["date"].replace(":", "").replace("+0000", "Z")
        path = folder / f"{date}-{self.environment['device']}.json"
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        return path


@dataclass(frozen=True)
class Report(Record):
    """All rows of a run, what it ran on, and the bytes a second that a copy of a vector moves."""

    copy_bandwidth: float
    rows: list[Row]
    comparisons: list[Comparison]


_WIDTHS = {
    **{"case": 18, "dtype": 8, "B": 5, "n": 10, "error": 6},
    **{"µs": 10, "p20": 10, "p80": 10, "unfused": 10, "ratio": 6},
    **{"GB/s": 6, "of copy": 8, "remark": 6},
}


def show_heading() -> None:
    """Print the names of the columns."""
    _show(_WIDTHS)


def show_row(row: Row) -> None:
    """Print one row: times in microseconds."""
    ours, unfused = row.ours, row.unfused
    _show(
        [
            *(row.case, row.dtype, str(row.systems), str(row.n)),
            "" if row.error is None else f"{row.error:.0e}",
            *(
                ["", "", ""]
                if ours is None
                else [f"{seconds * 1e6:.1f}" for seconds in (ours.p50, ours.p20, ours.p80)]
            ),
            "" if unfused is None else f"{unfused.p50 * 1e6:.1f}",
            "" if ours is None or unfused is None else f"{unfused.p50 / ours.p50:.2f}",
            "" if row.bandwidth is None else f"{row.bandwidth / 1e9:.0f}",
            "" if row.fraction is None else f"{100 * row.fraction:.0f} %",
            row.remark,
        ]
    )


def show_comparison(comparison: Comparison) -> None:
    """Print one comparison."""
    medians = ", ".join(f"{name} {t.p50 * 1e6:.2f} µs" for name, t in comparison.times.items())
    print(f"{comparison.about}: {medians}{comparison.remark}")


def _show(cells: Iterable[str]) -> None:
    print(
        " ".join(c.rjust(w) for c, w in zip(cells, _WIDTHS.values(), strict=True)).rstrip(),
        flush=True,
    )
