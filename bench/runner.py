"""Checks every answer, then times those that are right, in turns."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.case import (
    OURS,
    SAME_RESIDUAL,
    Absent,
    Case,
    Entry,
    Goal,
    MemoryGoal,
    Problem,
    ProductGoal,
    Run,
    Setting,
    Tensors,
)
from bench.peak import peak_and_calls
from bench.results import CaseResult, Row
from tritonimplicit_kernels.bench.clock import Times, in_turns, timed

MIN_ROUNDS, MAX_ROUNDS = 7, 200
SECONDS_PER_CASE = 5.0
"""Rounds beyond the least are done as long as a case takes no longer."""
MIB = 2**20
PRODUCTS = 10
"""As many in a row are timed, as they are in a solve."""
WRONG, NOT_REACHED = "wrong answer", "not reached"


@dataclass(frozen=True)
class _Contender:
    """An entry whose answer was right, and how long that took."""

    entry: Entry
    row: Row
    seconds: float


def run_case(case: Case, setting: Setting) -> CaseResult:
    """Build the case's problem and let every entry solve it."""
    began = time.perf_counter()
    with _peers_may_warn():
        result = measure(case.name, case.build(setting), setting)
    return replace(result, seconds=time.perf_counter() - began)


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
    raced, product = _race(contenders, problem, setting)
    rows |= {row.provider: row for row in raced}
    ordered = [rows[entry.provider] for entry in problem.entries]
    return CaseResult(
        name=name,
        about=problem.about,
        tolerance=problem.tolerance,
        peak_unit="MiB" if problem.vector_bytes is None else "vectors",
        rows=ordered,
        goal="; ".join(_judged(goal, rows, product) for goal in problem.goals),
        compares=problem.compares,
        error_is=problem.error_is,
        product=product,
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
    """Run once to warm up and be checked, once on the clock, and off it for memory and matvecs."""
    if isinstance(entry, Absent):
        return Row(entry.provider, remark=entry.reason)
    try:
        row = _told(entry, entry.prepare()(), problem)
        if row.remark:
            return row
        seconds, answer = timed(entry.prepare(), setting.device)
        del answer
        peak, calls = _peak(entry, problem, setting)
        matvecs = entry.matvecs() if entry.matvecs else None
    except Exception as error:  # a provider that fails is a row of the table, not its end
        return Row(entry.provider, remark=f"failed: {type(error).__name__}: {error}"[:200])
    return _Contender(entry, replace(row, peak=peak, calls=calls, matvecs=matvecs), seconds)


def _told(entry: Entry, answer: Tensors, problem: Problem) -> Row:
    """The gate's row, and what else is to be told of the answer: once, for that may be dear."""
    figures = entry.figures(answer) if entry.figures else {}
    return replace(checked(entry, answer, problem), figures=figures)


def checked(entry: Entry, answer: Tensors, problem: Problem) -> Row:
    """The gate: a row with the answer's error, and a remark if that is too large."""
    expected = problem.expected if entry.expected is None else entry.expected
    error = problem.error(answer) if problem.error else relative_error(answer, expected)
    right = error <= (entry.tolerance or problem.tolerance)  # False for NaN
    wrong = NOT_REACHED if problem.compares == SAME_RESIDUAL else WRONG
    return Row(
        entry.provider,
        error=error,
        remark="" if right else f"{wrong}: not timed",
    )


def _peak(entry: Entry, problem: Problem, setting: Setting) -> tuple[float | None, int | None]:
    if not entry.in_torch:
        return None, None
    peak, calls = peak_and_calls(entry.prepare(), setting.device)
    return peak / (problem.vector_bytes or MIB), calls


def _race(
    contenders: Sequence[_Contender], problem: Problem, setting: Setting
) -> tuple[list[Row], float | None]:
    """Time all in turns, A B A B, and a product; the last answer is checked as the first was."""
    if not contenders:
        return [], None
    lap = sum(contender.seconds for contender in contenders)
    affordable = int(0 if setting.quick else SECONDS_PER_CASE / lap)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, affordable))
    last: dict[str, Row] = {}
    entries = {contender.entry.provider: contender.entry for contender in contenders}

    def check(provider: str, answer: Tensors) -> None:
        if provider in entries:
            last[provider] = checked(entries[provider], answer, problem)

    prepared = {provider: entry.prepare for provider, entry in entries.items()}
    if problem.product is not None:
        prepared["a product"] = partial(_several, problem.product)
    seconds = in_turns(prepared, setting.device, rounds, check)
    products = seconds.pop("a product", None)
    times = {
        provider: Times.of([each / problem.repeats for each in taken])
        for provider, taken in seconds.items()
    }
    ours = times[OURS].p50 if OURS in times else None

    def row(contender: _Contender) -> Row:
        provider = contender.entry.provider
        if last[provider].remark:
            return replace(last[provider], figures=contender.row.figures)
        return replace(
            contender.row,
            median=times[provider].p50,
            p20=times[provider].p20,
            p80=times[provider].p80,
            relative=None if ours is None else times[provider].p50 / ours,
            rounds=rounds,
        )

    product = None if products is None else Times.of(products).p50 / PRODUCTS
    return [row(contender) for contender in contenders], product


def _several(prepare: Callable[[], Callable[[], object]]) -> Run:
    """Products in a row, after one that warms up."""
    product = prepare()
    product()

    def run() -> Tensors:
        for _ in range(PRODUCTS):
            product()
        return ()

    return run


def _judged(goal: Goal, rows: dict[str, Row], product: float | None) -> str:
    """What was asked for, and what came of it.

    A speed that was missed is told beside that which the products alone would have.
    """
    found: float | None
    if isinstance(goal, MemoryGoal):
        wanted, found = f"at most {goal.vectors:g} vectors", rows[OURS].peak
        met = found is not None and round(found, 2) <= goal.vectors
        reached = f"{found:.2f}" if found is not None else ""
    elif isinstance(goal, ProductGoal):
        wanted, found = f"at most {goal.products} products", rows[OURS].matvecs
        met = found is not None and found <= goal.products
        reached = str(found)
    else:
        ours = "" if goal.ours == OURS else f"{goal.ours}: "
        wanted = f"{ours}{goal.factor:g} times as fast as {goal.peer}"
        found = _speedup(rows[goal.ours], rows[goal.peer])
        met = found is not None and found >= goal.factor
        reached = f"{found:.2f} times" if found is not None else ""
        peer, own = rows[goal.peer].median, rows[goal.ours].matvecs
        if peer and own and product and not met:
            reached += f" ({peer / (own * product):.2f} with nothing but its {own} products)"
    if found is None:
        return f"{wanted}: not measured"
    return f"{wanted}: {'met' if met else 'missed'}, {reached}"


def _speedup(ours: Row, peer: Row) -> float | None:
    if ours.median is None or peer.median is None:
        return None
    return peer.median / ours.median


@contextmanager
def _peers_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        # TorchOpt 0.7.3 calls functorch by its old name, which torch announces at every call.
        warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)
        # linear_operator says what its row says, that it has not reached the residual.
        warnings.filterwarnings("ignore", "CG terminated in")
        yield
