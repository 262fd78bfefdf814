"""The fraction of a copy's bandwidth that each case achieves, by size."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from tritonimplicit_kernels.bench.results import Report

_DASHES = ("-", "--", ":", "-.")


def plot(report: Report, path: Path) -> Path:
    """Draw a panel a dtype, a colour a case, dashes by systems; return where the picture is."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = sorted({row.case for row in report.rows})
    batches = sorted({row.systems for row in report.rows})
    dtypes = sorted({row.dtype for row in report.rows})
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(6 * len(dtypes), 5), squeeze=False, sharey=True
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        rows = [row for row in report.rows if row.dtype == dtype and row.fraction is not None]
        for case, systems in sorted({(row.case, row.systems) for row in rows}):
            line = [row for row in rows if (row.case, row.systems) == (case, systems)]
            points = sorted((row.systems * row.n, row.fraction) for row in line)
            style = {"color": f"C{cases.index(case)}", "linestyle": _DASHES[batches.index(systems)]}
            label = f"{case}, B = {systems}"
            panel.plot(*zip(*points, strict=True), marker=".", label=label, **style)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set(xscale="log", xlabel="elements of a vector, B n", title=dtype, ylim=0)
    panels[0][0].set_ylabel("bandwidth over a copy's")
    panels[0][-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    device = report.environment.get("gpu") or report.environment["cpu"]
    figure.suptitle(f"{device}: a copy moves {report.copy_bandwidth / 1e9:.0f} GB/s")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path
