"""Every Python example in the README and in docs/ runs, and its results are right."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


BLOCKS = python_blocks(README)
DOCS = [
    pytest.param(block, id=f"{page.stem} {number}")
    for page in PAGES[1:]
    for number, block in enumerate(python_blocks(page), start=1)
    if "import torchdeq" not in block  # which tests/integration runs
]


def run(block):
    torch.manual_seed(0)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "example", "exec"), names)
    return names, printed.getvalue()


def find(word):
    (block,) = [block for block in BLOCKS if word in block]
    return block


def test_there_are_four():
    assert len(BLOCKS) == 4


def test_the_deep_equilibrium_model_has_the_gradient_of_its_unrolled_iteration():
    names, _ = run(find("DEQ"))
    layer, x = names["deq"].layer, names["x"]
    weights = tuple(layer.parameters())
    z = torch.zeros_like(x)
    for _ in range(200):
        z = layer(z, x)
    expected = torch.autograd.grad(z.square().mean(), weights)
    # Two solves to 1e-3, relative to a residual; ‖J‖ < 1/2 makes an error of each at most twice.
    for weight, b in zip(weights, expected, strict=True):
        assert (weight.grad - b).norm() <= 1e-2 * b.norm()


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


def test_the_gradient_of_the_penalties_is_that_of_the_fit_in_closed_form():
    names, _ = run(find("ridge"))
    x, y, x_val, y_val = (names[name].double() for name in ("x", "y", "x_val", "y_val"))
    log_a = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    w = torch.linalg.solve(x.T @ x + log_a.exp().diag(), x.T @ y)
    (x_val @ w - y_val).square().mean().backward()
    # The solve's tolerance is 1e-5, relative, in fp32; the matrix's condition number is below 10.
    error = (names["log_a"].grad.double() - log_a.grad).norm()
    assert error <= 1e-4 * log_a.grad.norm()


def test_the_solver_prints_what_its_comment_says():
    block = find("solution.status")
    _, printed = run(block)
    (promised,) = re.findall(r"# (\[.*\])", block)
    assert printed.splitlines()[0] == promised


# torch.func.hessian itself calls torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("block", DOCS)
def test_the_examples_of_the_docs_print_what_their_comments_say(block):
    promised = re.findall(r"^print\(.*\)  # (.+)$", block, flags=re.MULTILINE)
    _, printed = run(block)
    assert promised
    assert printed.splitlines() == promised


LINKS = [
    pytest.param(page, link, id=f"{page.stem}: {link}")
    for page in PAGES
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()
