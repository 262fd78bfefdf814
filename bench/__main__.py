"""python -m bench list | run [CASE...] | report [FILE...]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import tables
from bench.case import OURS, Setting
from bench.machine import environment
from bench.registry import CASES, select
from bench.results import CaseResult, Report
from bench.runner import run_case

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 1 where ours failed or was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the cases")
    run = commands.add_parser("run", help="run cases, all by default, and write down the result")
    run.add_argument("case", nargs="*", help="a case or a family")
    run.add_argument("--quick", action="store_true", help="smaller problems, 7 rounds")
    run.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--threads", type=int, help="of torch, on the CPU (default: torch's)")
    report = commands.add_parser("report", help="show results again, the latest by default")
    report.add_argument("file", nargs="*", type=Path)
    options = parser.parse_args(argv)
    if options.command == "list":
        return _list()
    return _run(parser, options) if options.command == "run" else _report(parser, options.file)


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
        cases = select(options.case)
    except ValueError as error:
        parser.error(str(error))
    setting = Setting(torch.device(options.device), options.quick)
    report = Report(environment(setting.device, setting.quick), [])
    for case in cases:
        report.cases.append(run_case(case, setting))
        tables.show_case(report.cases[-1])
    print(f"\n{report.save(options.out)}")
    return 0 if all(map(_ours_is_right, report.cases)) else 1


def _ours_is_right(case: CaseResult) -> bool:
    return not any(row.remark for row in case.rows if row.provider.startswith(OURS))


def _report(parser: argparse.ArgumentParser, files: list[Path]) -> int:
    files = files or sorted(RESULTS.glob("*.json"))[-1:]
    if not files:
        parser.error(f"there are no results in {RESULTS}: run first")
    for file in files:
        tables.show(Report.load(file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
