"""python -m tritonimplicit_kernels.bench [CASE...] [--device cuda] [--quick] [--out DIR]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tritonimplicit_kernels.backends import backend
from tritonimplicit_kernels.bench import results
from tritonimplicit_kernels.bench.cases import BY_NAME
from tritonimplicit_kernels.bench.machine import environment
from tritonimplicit_kernels.bench.runner import Plan, copy_bandwidth, measure_all


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 1 where an answer of ours was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tritonimplicit_kernels.bench")
    parser.add_argument("case", nargs="*", help=f"all by default: {', '.join(BY_NAME)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where it is")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, fewer rounds")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON file")
    parser.add_argument("--plot", action="store_true", help="a picture too; needs matplotlib")
    parser.add_argument("--threads", type=int, help="of torch, on the CPU (default: torch's)")
    options = parser.parse_args(argv)
    for name in options.case:
        if name not in BY_NAME:
            parser.error(f"there is no case {name!r}; known are {', '.join(BY_NAME)}")
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        parser.error("torch finds no CUDA device here")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if cuda else "cpu"))
    report = run(options.case, device, options.quick)
    path = report.save(options.out)
    print(f"\n{path}")
    if options.plot:
        # Imported here because matplotlib is an extra.
        from tritonimplicit_kernels.bench.plot import plot

        print(plot(report, path.with_suffix(".png")))
    wrong = [row for row in report.rows if row.error is not None and not row.error <= row.tolerance]
    return 1 if wrong else 0


def run(names: Sequence[str], device: torch.device, quick: bool) -> results.Report:
    """Measure, printing each row as it comes."""
    plan = Plan.on(device, quick)
    copied = copy_bandwidth(plan, device)
    print(f"a copy moves {copied / 1e9:.0f} GB/s, read and written")
    report = results.Report(environment(device, quick), copied, [], [])
    results.show_heading()
    cases = [BY_NAME[name] for name in names] or list(BY_NAME.values())
    for row in measure_all(cases, device, plan, copied):
        report.rows.append(row)
        results.show_row(row)
    if backend("auto", device, torch.float32).name == "triton":
        # Imported here because triton is optional.
        from tritonimplicit_kernels.bench.choices import comparisons

        for comparison in comparisons(device, plan):
            report.comparisons.append(comparison)
            results.show_comparison(comparison)
    return report


if __name__ == "__main__":
    sys.exit(main())
