"""`record_solves()`: what became of every linear solve in a stretch of code."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import Solution, Status

# Of the whole process, not of a thread: autograd runs backward passes in threads of its own.
_OPEN_LOGS: list[SolveLog] = []


class SolveLog(Sequence[Solution]):
    """The Solutions of the solves inside a `record_solves()`, in the order in which they ended.

    It holds copies of their values.
    """

    def __init__(self) -> None:
        self._solutions: list[Solution] = []

    def __len__(self) -> int:
        return len(self._solutions)

    @overload
    def __getitem__(self, index: int) -> Solution: ...

    @overload
    def __getitem__(self, index: slice) -> list[Solution]: ...

    def __getitem__(self, index: int | slice) -> Solution | list[Solution]:
        return self._solutions[index]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dict of plain numbers and strings a solve, for a logger."""
        return [_row(solution) for solution in self]

    def summary(self) -> str:
        """A table of the solves, a line each: iterations and residual norms over the systems."""
        header = ("solve", "solver", "systems", "iterations", "worst residual", "status")
        rows = [header, *(_cells(i, row) for i, row in enumerate(self.to_dicts()))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def plot(self, path: str | Path) -> None:
        """Draw residual norms by iteration into an image file: worst system a solve, band to best.

        Needs matplotlib (extra `examples`). Raises ValueError where no solve has a history.
        """
        from matplotlib.figure import Figure  # optional, and slow to import

        curves = [s for s in self if s.history is not None]
        if not curves:
            raise ValueError("no iterative solve was recorded: there is nothing to plot.")
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for number, solution in enumerate(curves):
            _draw(axes, solution, f"{number}: {solution.solver}" if len(curves) <= 10 else None)
        axes.set(xlabel="iteration", ylabel="residual norm", yscale="log")
        if len(curves) <= 10:
            axes.legend()
        figure.savefig(path)


@contextlib.contextmanager
def record_solves() -> Iterator[SolveLog]:
    """Collect a Solution, with its residual history, of each solve by a solver of this library.

    Those of backward passes too, in whatever thread they run. On a GPU nothing is read by the host
    until the log is asked.
    """
    log = SolveLog()
    _OPEN_LOGS.append(log)
    try:
        yield log
    finally:
        _OPEN_LOGS.remove(log)


def recording() -> bool:
    """Whether a log is open."""
    return bool(_OPEN_LOGS)


def record(solution: Solution) -> None:
    """Add a Solution to each open log, with a copy of its value: that itself is the caller's."""
    if _OPEN_LOGS:
        solution = dataclasses.replace(
            solution, value=optree.tree_map(Tensor.clone, solution.value)
        )
    for log in _OPEN_LOGS:
        log._solutions.append(solution)


def _row(solution: Solution) -> dict[str, Any]:
    status, iterations = solution.status.flatten().tolist(), solution.iterations.double().flatten()
    residuals = solution.residual_norm.flatten()
    counts = {Status(code).name: status.count(code) for code in sorted(set(status))}
    return {
        "solver": solution.solver,
        "systems": len(status),
        "converged": counts.get("CONVERGED", 0),
        "iterations_mean": float(iterations.mean()),
        "iterations_max": int(iterations.max()),
        "residual_norm_max": float(residuals.max()),  # NaN where there is one
        **{f"status_{name.lower()}": count for name, count in counts.items()},
    }


def _cells(index: int, row: dict[str, Any]) -> tuple[str, ...]:
    prefix = "status_"
    status = [f"{row[k]} {k.removeprefix(prefix).upper()}" for k in row if k.startswith(prefix)]
    return (
        str(index),
        row["solver"],
        str(row["systems"]),
        f"{row['iterations_mean']:.1f} (max {row['iterations_max']})",
        f"{row['residual_norm_max']:.2e}",
        ", ".join(status),
    )


def _draw(axes: Any, solution: Solution, label: str | None) -> None:
    assert solution.history is not None
    norms = solution.history.flatten(1).cpu()  # (iterations + 1, systems)
    steps = torch.arange(len(norms)).numpy()
    (line,) = axes.plot(steps, norms.amax(1).numpy(), label=label)
    if norms.shape[1] > 1:
        best = norms.amin(1).numpy()
        axes.fill_between(steps, best, norms.amax(1).numpy(), color=line.get_color(), alpha=0.15)
