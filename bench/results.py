"""What a run found out, as JSON and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from tritonimplicit_kernels.bench.results import Record


@dataclass(frozen=True)
class Row:
    """One provider on one problem; None where there is nothing to say, `remark` then says why.

    Seconds are of one unit of work: the median, and the 20th and 80th percentile. `relative` is the
    median over ours; `peak` is in vectors where the problem has such a unit, else in MiB;
    `calls` are the ops that torch dispatches in a run. `figures`
    is what a case tells besides.
    """

    provider: str
    error: float | None = None
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    relative: float | None = None
    rounds: int = 0
    matvecs: int | None = None
    peak: float | None = None
    calls: int | None = None
    remark: str = ""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseResult:
    """One case: its rows, what became of its goals, and the seconds that all of it took.

    `product` are the seconds of one product with the matrix, where that was timed.
    """

    name: str
    about: str
    tolerance: float
    peak_unit: str
    rows: list[Row]
    goal: str = ""
    compares: str = ""
    error_is: str = "relative, to float64"
    seconds: float | None = None
    product: float | None = None


@dataclass(frozen=True)
class Report(Record):
    """All cases of a run, and what it ran on."""

    cases: list[CaseResult]

    @classmethod
    def load(cls, path: Path) -> Report:
        stored = json.loads(path.read_text())
        cases = [
            CaseResult(**{**case, "rows": [Row(**row) for row in case["rows"]]})
            for case in stored["cases"]
        ]
        return cls(stored["environment"], cases)
