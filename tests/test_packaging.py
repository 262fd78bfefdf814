"""Both packages, from the source tree and from a built wheel, with and without Triton."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "tritonimplicit": ROOT / "tritonimplicit",
    "tritonimplicit_kernels": ROOT / "kernels" / "tritonimplicit_kernels",
}

# d x*/dt of x*(t) = sqrt(t), from the root of x^2 - t at t = 4: 1 / (2 sqrt(t)) = 0.25
ROOT_OF_FOUR = """
import torch
from tritonimplicit import custom_root

@custom_root(lambda x, t: x * x - t, argnums=1)
def solve(x0, t):
    return t.sqrt()

t = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
solve(torch.ones_like(t), t).sum().backward()
assert abs(t.grad.item() - 0.25) < 1e-12, t.grad
"""


def run_python(code: str, cwd: Path, *paths: Path) -> str:
    """What `code` prints in a fresh process that finds modules in `paths` first."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        cwd=cwd,
        env=env,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of the wheel, built from the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def distribution_at(folder: Path) -> importlib.metadata.Distribution:
    (info,) = folder.glob("*.dist-info")
    return importlib.metadata.Distribution.at(info)


@pytest.mark.parametrize("package", SOURCES)
def test_imports_uninstalled_and_without_triton_being_imported(
    package: str, tmp_path: Path
) -> None:
    code = f"import sys, {package}; print({package}.__file__); assert 'triton' not in sys.modules"
    printed = run_python(code, tmp_path, ROOT, ROOT / "kernels")
    assert Path(printed.strip()).parent == SOURCES[package]


def test_works_where_there_is_no_triton(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None" + ROOT_OF_FOUR
    run_python(code, tmp_path, ROOT, ROOT / "kernels")


def test_wheel_holds_both_packages_whole(unpacked_wheel: Path) -> None:
    sources = {
        Path(package) / path.relative_to(folder)
        for package, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.suffix in {".py", ".typed"}
    }
    files = {Path(file) for file in distribution_at(unpacked_wheel).files or []}
    assert {file for file in files if not file.parts[0].endswith(".dist-info")} == sources
    assert {Path(package, "py.typed") for package in SOURCES} <= sources


def test_wheel_says_what_it_is(unpacked_wheel: Path) -> None:
    distribution = distribution_at(unpacked_wheel)
    assert distribution.version == "0.1.0"
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    assert "Apache License" in (distribution.read_text("licenses/LICENSE") or "")
    assert [line for line in distribution.requires or [] if "extra ==" not in line] == [
        "optree>=0.13",
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
    ]


def test_wheel_works(unpacked_wheel: Path, tmp_path: Path) -> None:
    located = "import tritonimplicit, tritonimplicit_kernels\n"
    located += "print(tritonimplicit.__file__, tritonimplicit_kernels.__file__)\n"
    printed = run_python(located + ROOT_OF_FOUR, tmp_path, unpacked_wheel)
    assert [Path(name).parent for name in printed.split()] == [
        unpacked_wheel / package for package in SOURCES
    ]
