"""Every Python example in the README runs, and its gradients are right."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def run(block):
    torch.manual_seed(0)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "README.md", "exec"), names)
    return names, printed.getvalue()


def find(word):
    (block,) = [block for block in BLOCKS if word in block]
    return block


def test_there_are_three():
    assert len(BLOCKS) == 3


def test_the_deep_equilibrium_model_has_the_gradient_of_its_unrolled_iteration():
    names, _ = run(find("equilibrium"))
    weights = tuple(names["layer"].parameters())
    got = [weight.grad for weight in weights]
    z, x = torch.zeros_like(names["x"]), names["x"]
    for _ in range(200):
        z = names["f"](z, dict(names["layer"].named_parameters()), x)
    expected = torch.autograd.grad(z.square().mean(), weights)
    # The solve's tolerance is 1e-5, relative, in fp32.
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


def test_the_imaml_hypergradient_is_that_of_the_inner_problem_in_closed_form():
    names, _ = run(find("objective"))
    x, y = names["x"].double(), names["y"].double()
    design = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1)
    system = 2 / 20 * design.T @ design + torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.solve(system, design.mean(0))
    model = names["model"]
    got = torch.cat([model.weight.grad[0], model.bias.grad]).double()
    # The solve's tolerance is 1e-5, relative, in fp32; the matrix's condition number is below 10.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert y.shape == (20, 1)


def test_the_solver_prints_what_its_comment_says():
    block = find("solution.status")
    _, printed = run(block)
    (promised,) = re.findall(r"# (\[.*\])", block)
    assert printed.splitlines()[0] == promised


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")))
def test_links_lead_somewhere(link):
    assert (README.parent / link).exists()
