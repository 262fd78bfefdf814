"""python -m bench list | run [CASE...] | show [FILE...] | report [FILE...]."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import document, tables
from bench.case import OURS, Setting
from bench.machine import environment
from bench.registry import CASES, select
from bench.results import CaseResult, Report, Row
from bench.runner import NOT_REACHED, run_case

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 1 where ours failed or was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the cases")
    run = commands.add_parser("run", help="run cases, all by default, and write down the result")
    run.add_argument("case", nargs="*", help="a case or a family")
    run.add_argument("--quick", action="store_true", help="7 rounds, smaller problems")
    run.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--threads", type=int, help="of torch, on the CPU (default: torch's)")
    show = commands.add_parser("show", help="show results again, the latest by default")
    show.add_argument("file", nargs="*", type=Path)
    report = commands.add_parser("report", help="write docs/benchmarks.md and the README's table")
    report.add_argument(
        "file",
        nargs="*",
        type=Path,
        help="of each device the latest, a full run first",
    )
    report.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    options = parser.parse_args(argv)
    if options.command == "list":
        return _list()
    if options.command == "run":
        return _run(parser, options)
    if options.command == "show":
        return _show(parser, options.file)
    return _report(parser, options.file, options.root)


def _list() -> int:
    width = max(len(case.name) for case in CASES)
    for case in CASES:
        print(f"{case.name:{width}}  {case.about}")
    return 0


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        cases = select(options.case, options.quick)
    except ValueError as error:
        parser.error(str(error))
    setting = Setting(torch.device(options.device), options.quick)
    if setting.device.type == "cuda":  # the ten bits of TF32 cannot meet the tolerances
        torch.backends.cudnn.allow_tf32 = False
    report, began = Report(environment(setting.device, setting.quick), []), time.perf_counter()
    for case in cases:
        report.cases.append(run_case(case, setting))
        tables.show_case(report.cases[-1])
        path = report.save(options.out)  # after each: a run that is interrupted has been of use
    print(f"\n{len(cases)} cases in {time.perf_counter() - began:.0f} s")
    print(path)
    return 0 if all(map(_ours_is_right, report.cases)) else 1


def _ours_is_right(case: CaseResult) -> bool:
    """Whether no answer of ours is wrong.

    A solver of ours that is not the one for a problem may fall short of a residual: it says so.
    """

    def wrong(row: Row) -> bool:
        falls_short = row.remark.startswith(NOT_REACHED) and row.provider != OURS
        return bool(row.remark) and not falls_short

    return not any(wrong(row) for row in case.rows if row.provider.startswith(OURS))


def _show(parser: argparse.ArgumentParser, files: list[Path]) -> int:
    files = files or sorted(RESULTS.glob("*.json"))[-1:]
    if not files:
        parser.error(f"there are no results in {RESULTS}: run first")
    for file in files:
        tables.show(Report.load(file))
    return 0


def _report(parser: argparse.ArgumentParser, files: list[Path], root: Path) -> int:
    latest: dict[tuple[str, bool], Path] = {}
    for path in files or sorted(RESULTS.glob("*.json")):
        facts = Report.load(path).environment
        latest[facts["device"], facts["quick"]] = path
    if not latest:
        parser.error(f"there are no results in {RESULTS}: run first")
    for device in dict.fromkeys(device for device, _ in latest):
        path = latest.get((device, False)) or latest[device, True]
        for written in document.write(Report.load(path), path, root):
            print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
