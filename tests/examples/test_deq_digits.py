"""The demo, a short run of it on the real digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tritonimplicit import ConvergenceError
from tritonimplicit.nn import Implicit

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def demo(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("deq_digits")


def test_short_run_learns_with_the_right_gradient(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy, cosine = demo.run(epochs=2, seed=0, device=torch.device("cpu"), out=tmp_path / "new")
    # Chance is 10 %, with a standard deviation of 1.6 % over the 360 held-out images.
    assert accuracy > 0.7
    # Both gradients are exact but for tolerances of 1e-10 and 1e-13, so 1 - cosine is near 1e-20.
    assert cosine > 1 - 1e-12
    assert (tmp_path / "new" / "deq_digits.png").read_bytes().startswith(PNG_SIGNATURE)
    table = capsys.readouterr().out
    assert f"{accuracy:.2%} of 360 held-out images" in table
    assert "reference (torch)" in table


@pytest.mark.parametrize(
    ("reached", "cosine", "options", "code", "message"),
    [
        (0.98, 0.99999, [], 0, ""),
        (0.97, 0.99999, [], 1, "held-out accuracy 97.00% is below 97.5%"),
        (0.97, 0.99999, ["--quick"], 0, ""),
        (0.98, 0.999, ["--quick"], 1, "cosine 0.999000 of the gradients is below 0.9999"),
        (0.98, float("nan"), [], 1, "cosine nan of the gradients is below 0.9999"),
    ],
)
def test_exit_code_says_whether_the_marks_were_reached(
    demo: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reached: float,
    cosine: float,
    options: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(demo, "run", lambda *_: (reached, cosine))
    assert demo.main(options) == code
    assert message in capsys.readouterr().err


def test_unconverged_solves_are_errors(demo: ModuleType) -> None:
    x, y, *_ = demo.digits(torch.device("cpu"))
    expanding = demo.Classifier()
    expanding.contraction = lambda: 10 * expanding.weight
    with pytest.raises(ConvergenceError, match="Picard: 8 of 8 systems diverged"):
        expanding(x[:8])

    def expanding_backwards(matvec: object, b: tuple[torch.Tensor]) -> object:
        return demo.BACKWARD(lambda v: (3 * v[0],), b)

    model = demo.Classifier()
    model.deq.gradient = Implicit(expanding_backwards)
    logits, _ = model(x[:8])
    with pytest.raises(ConvergenceError, match="Neumann: 8 of 8 systems diverged"):
        torch.nn.functional.cross_entropy(logits, y[:8]).backward()
