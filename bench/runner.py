"""Checks every answer, then times those that are right, in turns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.case import OURS, Absent, Case, Entry, MemoryGoal, Problem, Setting, Tensors
from bench.peak import peak_bytes
from bench.results import CaseResult, Row
from tritonimplicit_kernels.bench.clock import Times, in_turns, timed

MIN_ROUNDS, MAX_ROUNDS = 7, 200
SECONDS_PER_CASE = 10.0
"""Rounds beyond the least are done as long as a case takes no longer."""
MIB = 2**20


@dataclass(frozen=True)
class _Contender:
    """An entry whose answer was right, and how long that took."""

    entry: Entry
    row: Row
    seconds: float


def run_case(case: Case, setting: Setting) -> CaseResult:
    """Build the case's problem and let every entry solve it."""
    with _peers_may_warn():
        return measure(case.name, case.build(setting), setting)


def measure(name: str, problem: Problem, setting: Setting) -> CaseResult:
    """Gate before clock: an answer that is wrong gets no time."""
    rows: dict[str, Row] = {}
    contenders: list[_Contender] = []
    for entry in problem.entries:
        admitted = _admit(entry, problem, setting)
        if isinstance(admitted, Row):
            rows[entry.provider] = admitted
        else:
            rows[entry.provider] = admitted.row
            contenders.append(admitted)
    rows |= {row.provider: row for row in _race(contenders, problem, setting)}
    ordered = [rows[entry.provider] for entry in problem.entries]
    return CaseResult(
        name=name,
        about=problem.about,
        tolerance=problem.tolerance,
        peak_unit="MiB" if problem.vector_bytes is None else "vectors",
        rows=ordered,
        goal=_judged(problem, rows),
    )


def relative_error(answer: Tensors, expected: Tensors) -> float:
    """‖answer - expected‖ / ‖expected‖, over all tensors, in float64; NaN for another shape."""
    if [t.shape for t in answer] != [t.shape for t in expected]:
        return math.nan
    off = [torch.linalg.vector_norm(a - e) for a, e in zip(answer, expected, strict=True)]
    return float(_norm(off) / _norm([torch.linalg.vector_norm(e) for e in expected]))


def _norm(norms: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return norm


def _admit(entry: Entry | Absent, problem: Problem, setting: Setting) -> _Contender | Row:
    """Run once to warm up, once for the answer, and off the clock for memory and matvecs."""
    if isinstance(entry, Absent):
        return Row(entry.provider, remark=entry.reason)
    try:
        entry.prepare()()
        seconds, answer = timed(entry.prepare(), setting.device)
        row = _checked(entry.provider, answer, problem)
        if row.remark:
            return row
        del answer
        peak = peak_bytes(entry.prepare(), setting.device) / (problem.vector_bytes or MIB)
        matvecs = entry.matvecs() if entry.matvecs else None
    except Exception as error:  # a provider that fails is a row of the table, not its end
        return Row(entry.provider, remark=f"failed: {type(error).__name__}: {error}"[:200])
    return _Contender(entry, replace(row, peak=peak, matvecs=matvecs), seconds)


def _checked(provider: str, answer: Tensors, problem: Problem) -> Row:
    error = relative_error(answer, problem.expected)
    right = error <= problem.tolerance  # False for NaN
    return Row(provider, error=error, remark="" if right else "wrong answer: not timed")


def _race(contenders: Sequence[_Contender], problem: Problem, setting: Setting) -> Iterator[Row]:
    """Time all in turns, A B A B; the last answer is checked as the first was."""
    if not contenders:
        return
    lap = sum(contender.seconds for contender in contenders)
    affordable = int(0 if setting.quick else SECONDS_PER_CASE / lap)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, affordable))
    last: dict[str, Row] = {}

    def check(provider: str, answer: Tensors) -> None:
        last[provider] = _checked(provider, answer, problem)

    prepared = {contender.entry.provider: contender.entry.prepare for contender in contenders}
    seconds = in_turns(prepared, setting.device, rounds, check)
    times = {
        provider: Times.of([each / problem.repeats for each in taken])
        for provider, taken in seconds.items()
    }
    ours = times[OURS].p50 if OURS in times else None
    for contender in contenders:
        provider = contender.entry.provider
        if last[provider].remark:
            yield last[provider]
            continue
        yield replace(
            contender.row,
            median=times[provider].p50,
            p20=times[provider].p20,
            p80=times[provider].p80,
            relative=None if ours is None else times[provider].p50 / ours,
            rounds=rounds,
        )


def _judged(problem: Problem, rows: dict[str, Row]) -> str:
    """What was asked for, and what came of it."""
    goal = problem.goal
    if goal is None:
        return ""
    if isinstance(goal, MemoryGoal):
        wanted, found = f"at most {goal.vectors:g} vectors", rows[OURS].peak
        met = found is not None and round(found, 2) <= goal.vectors
        reached = "" if found is None else f"{found:.2f}"
    else:
        wanted = f"{goal.factor:g} times as fast as {goal.peer}"
        found = rows[goal.peer].relative
        met = found is not None and found >= goal.factor
        reached = "" if found is None else f"{found:.2f} times"
    if found is None:
        return f"{wanted}: not measured"
    return f"{wanted}: {'met' if met else 'missed'}, {reached}"


@contextmanager
def _peers_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        # TorchOpt 0.7.3 calls functorch by its old name, which torch announces at every call.
        warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)
        yield
