"""What the numbers depend on besides the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import torch

LIBRARIES: Final = ("torch", "triton", "numpy")


def environment(
    device: torch.device, quick: bool, libraries: Sequence[str] = LIBRARIES
) -> dict[str, Any]:
    """Return machine, versions, commit, date and threads."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "quick": quick,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(libraries),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["driver"] = _driver()
    return found


def versions(libraries: Sequence[str]) -> dict[str, str | None]:
    """Return the version of each distribution; None where it is not installed."""
    found: dict[str, str | None] = {}
    for library in libraries:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def commit() -> str | None:
    """Return this checkout's commit, "+changes" if files differ from it; None outside of one."""
    here = Path(__file__)
    # Installed into an environment inside some other checkout, this file is none of its files.
    if _output("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name) is None:
        return None
    head = _output("git", "-C", str(here.parent), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(here.parent), "status", "--porcelain", "-uno")
    return None if head is None else head + ("+changes" if changed else "")


def _driver() -> str | None:
    """The driver's version, as its own tool says it."""
    if torch.version.hip is not None:
        return _output("cat", "/sys/module/amdgpu/version")
    query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return query.splitlines()[0] if query else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
