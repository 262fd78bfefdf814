"""Training of the byte language model: alone, interrupted, shared by two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tritonimplicit

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SMALL = """
from byte_lm import Config
SMALL = Config(width=16, heads=2, context=16, forward_rtol=1e-5, backward_rtol=1e-5, maxiter=100)
deq_lm.WARM_UP, deq_lm.CLIP = 1, 1e9
deq_lm.PRESETS["cpu"] = deq_lm.Preset(SMALL, batch=4, steps=6, every=2)
"""


@pytest.fixture(scope="module")
def deq_lm(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("deq_lm")


@pytest.fixture(autouse=True)
def small(deq_lm, monkeypatch) -> None:
    for name in ("PRESETS", "WARM_UP", "CLIP"):
        monkeypatch.setattr(deq_lm, name, {})  # undone after the test
    exec(SMALL, {"deq_lm": deq_lm})


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A source of ours, often enough for two held-out blocks."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes((Path(__file__).read_bytes() * 100)[: 80 * 4096])
    return path


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "deq_lm.pt", weights_only=True)


def test_a_short_run_learns_and_leaves_what_it_promises(deq_lm, text, tmp_path, capsys):
    code = deq_lm.main(["--text", str(text), "--out", str(tmp_path), "--device", "cpu"])
    assert code == 1  # six steps do not beat the trigrams
    printed = capsys.readouterr()
    assert "bits per byte; trigrams take" in printed.err
    assert "0.00% unsolved" in printed.out
    assert "passed after -" in printed.out
    assert (tmp_path / "deq_lm.png").read_bytes().startswith(PNG_SIGNATURE)
    evaluations = checkpoint(tmp_path)["history"]["evaluations"]
    assert [step for step, _, _ in evaluations] == [2, 4, 6]
    assert evaluations[-1][2] < evaluations[0][2]
    model = sys.modules["byte_lm"].load(tmp_path / "byte_lm.pt")
    for name, weight in model.state_dict().items():
        assert weight.equal(checkpoint(tmp_path)["model"][name].half().float())


def test_an_interrupted_run_goes_on_bit_for_bit(deq_lm, text, tmp_path, monkeypatch):
    def run(out: Path, *more: str) -> None:
        deq_lm.main(["--text", str(text), "--out", str(out), "--device", "cpu", *more])

    run(tmp_path / "whole")
    step = deq_lm.Training.step

    def interrupted(training: Any) -> list[float]:
        if len(training.steps) == 3:  # one step after a checkpoint
            raise KeyboardInterrupt
        return step(training)

    monkeypatch.setattr(deq_lm.Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    assert len(checkpoint(tmp_path / "parts")["history"]["steps"]) == 2
    monkeypatch.setattr(deq_lm.Training, "step", step)
    run(tmp_path / "parts", "--resume")

    whole, parts = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole["history"]["steps"] == parts["history"]["steps"]
    assert whole["schedule"] == parts["schedule"]
    for name, weight in whole["model"].items():
        assert weight.equal(parts["model"][name]), name
    states = whole["optimiser"]["state"], parts["optimiser"]["state"]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert all(one[name].equal(other[name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_a_checkpoint_of_another_training_is_refused(deq_lm, text, tmp_path):
    arguments = ["--text", str(text), "--out", str(tmp_path), "--device", "cpu", "--steps", "2"]
    deq_lm.main(arguments)
    with pytest.raises(ValueError, match=r"deq_lm.pt is of .*'seed': 0.* not of .*'seed': 1"):
        deq_lm.main([*arguments, "--resume", "--seed", "1"])


def test_two_processes_have_the_gradient_of_one_on_the_joint_batch(deq_lm, text, tmp_path):
    script = tmp_path / "script.py"
    arguments = ["--text", str(text), "--steps", "1", "--device", "cpu", "--out"]
    # Threads that are left abort the interpreter's teardown, not often, so they are looked for.
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(EXAMPLES)!r})\nimport deq_lm\n{SMALL}\n"
        f"code = deq_lm.main({[*arguments, str(tmp_path / 'two')]!r})\n"
        "for task in os.listdir('/proc/self/task'):\n"
        "    print('left:', open(f'/proc/self/task/{task}/comm').read(), end='')\n"
        "sys.exit(code)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(Path(tritonimplicit.__file__).parents[1] / part) for part in (".", "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "processes: 2" in done.stdout
    assert "left: python" in done.stdout and "gloo" not in done.stdout
    deq_lm.main([*arguments, str(tmp_path / "one")])
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    # After one step the first moment is a tenth of the gradient.
    moments = [
        torch.cat([s["exp_avg"].flatten() for s in saved["optimiser"]["state"].values()]).double()
        for saved in (one, two)
    ]
    # Both are exact but for tolerances of 1e-5 in each solve, which (I - J)^-1 amplifies.
    assert (moments[0] - moments[1]).norm() < 1e-3 * moments[0].norm()
    # The losses of step and held-out text are means over the same bytes.
    assert two["history"]["evaluations"][0][2] == pytest.approx(
        one["history"]["evaluations"][0][2], abs=1e-3
    )


def test_a_batch_that_cannot_be_shared_is_an_error(deq_lm, text):
    preset = replace(deq_lm.PRESETS["cpu"], batch=3)
    world = deq_lm.World(torch.device("cpu"), rank=0, size=2)
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared by 2 equally"):
        deq_lm.Training(deq_lm.read([text]), preset, seed=0, amp=False, world=world)


def test_mixed_precision_trains_within_its_tolerances(deq_lm, text, tmp_path, capsys):
    arguments = ["--text", str(text), "--out", str(tmp_path), "--device", "cpu", "--steps", "4"]
    deq_lm.main([*arguments, "--amp"])
    saved = checkpoint(tmp_path)
    assert saved["settings"]["preset"]["model"]["forward_rtol"] == 1e-2
    assert all(weight.dtype == torch.float32 for weight in saved["model"].values())
    first, *_, last = saved["history"]["steps"]
    assert last[0] < first[0]
    assert [*first[3:], *last[3:]] == [0, 0, 0, 0]  # all systems solved
