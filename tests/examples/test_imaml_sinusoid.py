"""Implicit MAML on sinusoids: the batch's hypergradient, and a short run."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from tritonimplicit.linear_solve import solve_minres

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("imaml_sinusoid")


def test_the_batched_hypergradient_is_the_slope_of_the_loss(demo, monkeypatch):
    """In float64, at inner solutions to rounding level, against central differences."""
    monkeypatch.setattr(demo, "PENALTY", 5.0)  # convex enough to come all the way in 20 steps
    monkeypatch.setattr(demo, "BACKWARD", solve_minres(rtol=1e-10, on_failure="raise"))
    torch.manual_seed(0)
    drawn = demo.draw_tasks(3, 10, CPU)
    x, y, x_out, y_out = (t.double() for t in drawn)
    y, y_out = 0.3 * y, 0.3 * y_out
    network = demo.Network().double()
    adaptation = demo.Adaptation(network, inner_steps=20)
    adapt = torch.func.vmap(adaptation, in_dims=(None, 0, 0))

    def outer(meta: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(adaptation.loss)(adapt(meta, x, y), x_out, y_out).sum()

    meta = network.flat().detach().requires_grad_()
    slope = torch.func.vmap(torch.func.grad(adaptation.objective), (0, None, 0, 0))
    left = slope(adapt(meta, x, y), meta, x, y).detach().norm(dim=1)
    assert left.max() < 1e-8  # where the objective's own rounding hides a descent
    (gradient,) = torch.autograd.grad(outer(meta), meta)
    direction = torch.nn.functional.normalize(torch.randn_like(meta), dim=0)
    step = 1e-3
    with torch.no_grad():
        ends = [outer(meta + sign * step * direction) for sign in (1, -1)]
    slope_there = (ends[0] - ends[1]) / (2 * step)
    # step^2 from the third derivative, 1e-8 / (penalty * step) from what is left of the gradient.
    assert abs(gradient @ direction - slope_there) < 1e-5 * gradient.norm()


def test_a_batch_of_tasks_is_its_tasks(demo):
    torch.manual_seed(0)
    tasks = demo.draw_tasks(3, 10, CPU)
    meta = demo.Meta(CPU)
    together = meta.adapt(meta.parameters, tasks.x, tasks.y)
    adaptation = demo.Adaptation(meta.network)
    for task, params in enumerate(together):
        alone = adaptation(meta.parameters, tasks.x[task], tasks.y[task])
        # Rounding, that ten damped least squares steps amplify by at most 1e3 or so.
        assert (alone - params).norm() < 1e-3 * (alone - meta.parameters).norm()


def test_a_short_run_learns(demo, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "TASKS", 8)
    monkeypatch.setattr(demo, "HELD_OUT", 20)
    before, after = demo.run(steps=3, seed=0, device=CPU, out=tmp_path / "new")
    assert after < before / 2  # adaptation helps from the first; three steps change little
    assert (tmp_path / "new" / "imaml_sinusoid.png").read_bytes().startswith(PNG_SIGNATURE)
    printed = capsys.readouterr().out
    assert f"{before:.3f} (mean of 20 tasks)" in printed
    assert f"{after:.3f}; before meta-training" in printed


@pytest.mark.parametrize(
    ("after", "options", "code"),
    [(0.5, [], 0), (2.0, [], 1), (2.0, ["--quick"], 0), (float("nan"), [], 1)],
)
def test_exit_code_says_whether_adaptation_helped(demo, monkeypatch, capsys, after, options, code):
    monkeypatch.setattr(demo, "run", lambda *_: (4.0, after))
    assert demo.main(options) == code
    assert ("too little" in capsys.readouterr().err) == bool(code)
