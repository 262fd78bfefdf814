"""What each private part of PyTorch is used for: a new version that changes one fails here."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.autograd import forward_ad

from tritonimplicit.torch_internals import (
    forward_rule,
    is_gradient,
    is_transformed,
    transforms_active,
    untraced,
)

ROOT = Path(__file__).parents[1]


def test_transforms_are_noticed():
    seen, escaped = [], []

    def f(x):
        seen.append((transforms_active(), is_transformed(x)))
        escaped.append(x)
        return x.sum()

    f(torch.ones(2))
    torch.func.grad(f)(torch.ones(2))
    assert not is_transformed(escaped[-1])
    torch.func.vmap(f)(torch.ones(2, 2))
    assert seen == [(False, False), (True, True), (True, True)]


def test_untraced_functions_break_the_graph_and_need_no_compiler_at_import():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @untraced
    def inner(x):
        assert not torch.compiler.is_dynamo_compiling()
        return x + 1

    compiled = torch.compile(lambda x: inner(x * 2) * 3, backend=backend)
    assert compiled(torch.ones(1)).item() == 9 and len(graphs) == 2
    script = "import sys, tritonimplicit; assert 'torch._dynamo' not in sys.modules"
    path = os.pathsep.join(str(ROOT / source) for source in (".", "kernels"))
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": path}
    )


def test_the_forward_rule_nests_and_sees_primal_values():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs)
            ctx.save_for_backward(*inputs)

        @staticmethod
        @forward_rule
        def jvp(ctx, saved, tangent):
            assert forward_ad.unpack_dual(saved[0]).tangent is None or transforms_active()
            return 2 * saved[0] * tangent

    def derivative(f):
        return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        second = derivative(derivative(Square.apply))(torch.tensor(3.0))
    assert second.item() == 2


def test_a_gradient_by_its_first_argument_is_recognised():
    def fn(x, y):
        return (x * y).sum()

    assert is_gradient(torch.func.grad(fn))
    for other in (
        fn,
        torch.func.grad(fn, argnums=1),
        torch.func.grad(fn, argnums=(0, 1)),
        torch.func.grad(fn, has_aux=True),
        torch.func.jacrev(fn),
        functools.partial(torch.func.grad(fn), y=1.0),
        torch.sum,
    ):
        assert not is_gradient(other)
