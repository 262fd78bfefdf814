"""Products that the fused steps read from leaves where they lie, as they do with `cuda_graph`."""

import contextlib
import dataclasses

import pytest
import torch

import tritonimplicit_kernels as kernels
from tritonimplicit import custom_root
from tritonimplicit.linear_solve import CG, BiCGSTAB, Jacobi, Neumann, NormalCG
from tritonimplicit.linear_solve.bicgstab import _Twice
from tritonimplicit.linear_solve.rows import RowMatvec
from tritonimplicit.vectors import Layout

SOLVERS = {
    "cg": CG(rtol=1e-3, maxiter=12),
    "cg-jacobi": CG(rtol=1e-3, maxiter=12, M=Jacobi(2)),
    "normal_cg": NormalCG(rtol=1e-3, maxiter=12),
    "neumann": Neumann(rtol=1e-3, maxiter=12, alpha=0.6),
    "bicgstab": BiCGSTAB(rtol=1e-3, maxiter=12),
    "bicgstab-jacobi": BiCGSTAB(rtol=1e-3, maxiter=12, M=Jacobi(2)),
}
PRODUCTS = {"bicgstab": 2, "bicgstab-jacobi": 2}  # a step; of the others 1
FLOAT = (torch.float32,) * 3
MIXED = (torch.bfloat16, torch.float32, torch.float16)


def tree(dtypes, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 37), "b": (3, 4, 5), "c": (3,)}
    return {
        name: torch.randn(shape, generator=generator).to(device, dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }


def scale(v):
    """The diagonal, in [1, 2], of the matrix that acts on leaves like v."""
    steps = torch.linspace(1, 2, v.numel(), device=v.device)
    return steps.view(v.shape).to(v.dtype)


def unaligned(leaf):
    memory = leaf.new_full((leaf.numel() + 1,), torch.nan)
    memory[1:] = leaf.flatten()
    return memory[1:].view(leaf.shape)


def transposed(leaf):
    return leaf.transpose(0, -1).contiguous().transpose(0, -1)


MEMORY = {
    "new": lambda leaf: leaf,
    "unaligned": unaligned,
    "transposed": transposed,
    "negative": lambda leaf: torch.complex(leaf, -leaf).conj().imag if leaf.numel() > 99 else leaf,
}


def in_graphs(solver, device):
    """Solve with cuda_graph=True; where there can be no graph, a warning says so."""
    asked = dataclasses.replace(solver, cuda_graph=True, check_every=2, backend="triton")

    def solve(matvec, b):
        warns = pytest.warns(UserWarning, match="no graph could be captured")
        with warns if device == "cpu" else contextlib.nullcontext():
            return asked.solve(matvec, b)

    return solve


def assert_same_solution(got, expected):
    assert torch.equal(got.status, expected.status)
    assert torch.equal(got.iterations, expected.iterations)
    for name, leaf in expected.value.items():
        assert torch.equal(got.value[name], leaf), name


@pytest.mark.parametrize("batch_ndim", [0, 1])
@pytest.mark.parametrize("dtypes", [FLOAT, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_solve_that_reads_leaves_has_the_bits_of_one_that_reads_rows(
    solver, dtypes, batch_ndim, device
):
    solver = dataclasses.replace(solver, batch_ndim=batch_ndim, on_failure="ignore")
    b = tree(dtypes, device)

    def matvec(v):
        means = {name: leaf.view(3, -1).mean(1) for name, leaf in v.items()}
        return {
            name: scale(leaf) * leaf + means[name].view(3, *[1] * (leaf.ndim - 1))
            for name, leaf in v.items()
        }

    expected = dataclasses.replace(solver, backend="triton").solve(matvec, b)
    assert (expected.iterations >= 2).all()
    assert_same_solution(in_graphs(solver, device)(matvec, b), expected)


@pytest.mark.parametrize("kind", [CG, BiCGSTAB])
@pytest.mark.parametrize("memory", MEMORY)
def test_a_product_may_lie_in_memory_as_it_likes(memory, kind, device):
    solver = kind(rtol=1e-3, maxiter=12, batch_ndim=1)
    b = tree(FLOAT, device)

    def matvec(v):
        av = {name: scale(leaf) * leaf for name, leaf in v.items()}
        return {name: MEMORY[memory](leaf) for name, leaf in av.items()} | {"c": v["c"]}

    def plainly(v):
        return {name: scale(leaf) * leaf for name, leaf in v.items()} | {"c": v["c"].clone()}

    expected = dataclasses.replace(solver, backend="triton").solve(plainly, b)
    assert_same_solution(in_graphs(solver, device)(matvec, b), expected)


class Reusing:
    """A diagonal matrix; the results' leaves `reused` share their memory, from a call on."""

    def __init__(self, reused, from_call=1):
        self.reused, self.from_call, self.calls, self.out = reused, from_call, 0, None

    def __call__(self, v):
        self.calls += 1
        av = {name: scale(leaf) * leaf for name, leaf in v.items()}
        if self.reused is None or self.calls < self.from_call:
            return av
        if self.out is None:
            self.out = torch.empty_like(av[self.reused])
        return av | {self.reused: self.out.copy_(av[self.reused])}


@pytest.mark.parametrize("reused", ["a", "c"])
def test_bicgstabs_first_product_outlives_a_second_in_the_same_memory(reused, device):
    solver, b = BiCGSTAB(rtol=1e-6, maxiter=12, batch_ndim=1), tree(FLOAT, device)
    expected = in_graphs(solver, device)(Reusing(None), b)
    assert (expected.iterations > 2).all()
    assert_same_solution(in_graphs(solver, device)(Reusing(reused), b), expected)


def test_leaves_that_come_to_share_memory_are_an_error(device):
    solver, b = BiCGSTAB(rtol=1e-6, maxiter=12, batch_ndim=1), tree(FLOAT, device)
    solver = dataclasses.replace(solver, cuda_graph=True, backend="triton")
    with pytest.raises(RuntimeError, match=r"writes over its last result.*result\.clone\(\)"):
        solver.solve(Reusing("b", from_call=4), b)


@pytest.mark.parametrize("reused", [None, "b"])
def test_leaves_of_a_first_product_are_copied_only_where_their_memory_is_used_again(reused):
    b = tree(FLOAT)
    apply, v, _ = product_of(b, Reusing(reused))
    product = _Twice(apply)
    for copied in (True, reused is not None, reused is not None):
        first = product.first(v)
        own = zip(first, product._result, strict=True)
        assert all((kept is leaf) != copied for kept, leaf in own)
        values = [leaf.clone() for leaf in first]
        product.second(2 * v)
        assert all(map(torch.equal, first, values))


def product_of(b, matvec, ridge=None):
    layout = Layout.of(b)
    apply = RowMatvec(matvec, layout, ridge)
    apply.read_leaves_in_place()
    v = layout.flatten(b, "b")
    return apply, v, apply.product(v)


def test_what_is_a_row_already_or_becomes_a_new_one_is_read_as_rows():
    leaf = torch.randn(48)
    doubled = []

    def double(v):
        doubled.append(2 * v)
        return doubled[-1]

    _, v, product = product_of(leaf, double)
    assert product.data_ptr() == doubled[0].data_ptr() and torch.equal(product, 2 * v)
    _, v, product = product_of((leaf, leaf[:3]), lambda v: v, ridge=1.0)
    assert torch.equal(product, 2 * v)


def test_leaves_are_copied_only_where_they_must_be():
    b = (torch.randn(6), torch.randn(6), torch.randn(2, 3), torch.randn(4))
    wide = torch.zeros(3, 2)
    made = []

    def matvec(v):  # swapped, which is v's own memory; transposed; expanded
        made[:] = [2 * v[2]]
        return v[1], v[0], wide.T, torch.ones(1).expand(4)

    apply, v, _ = product_of(b, matvec)
    own = {t.untyped_storage().data_ptr() for t in (v, wide)}
    assert not own & {leaf.untyped_storage().data_ptr() for leaf in apply._leaves}
    assert all(kernels.readable(leaf) for leaf in apply._leaves)
    assert torch.equal(apply._leaves[0][0], b[1]) and torch.equal(apply._leaves[1][0], b[0])

    apply, _, table = product_of(
        b, lambda v: tuple(made.append(2 * leaf) or made[-1] for leaf in v)
    )
    pointers = [leaf.data_ptr() for leaf in made[-4:]]
    assert [leaf.data_ptr() for leaf in apply._leaves] == pointers
    assert table.dtype is torch.int64 and table.shape == (1 + 4 * 4,)


def test_a_graphs_products_have_tables_made_before_it(monkeypatch):
    b = (torch.randn(6), torch.randn(4))
    apply, v, _ = product_of(b, lambda v: tuple(2 * leaf for leaf in v))
    apply.before_capture(2)
    with monkeypatch.context() as capture:
        capture.setattr("tritonimplicit_kernels.leaves._captures", lambda device: True)
        first, second = apply.product(v), apply.product(v)
        with pytest.raises(RuntimeError, match="more tables than the 2 reserved"):
            apply.product(v)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    apply.captured()
    assert second[0] == first[0] and torch.equal(second[3::4], first[3::4])  # written: the ends
    assert second[3::4].tolist() == [6, 16 + 4]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solve_makes_as_many_tables_as_its_graph_has_products(name, monkeypatch):
    events, product = [], RowMatvec.product
    solver, products = SOLVERS[name], 4 * PRODUCTS.get(name, 1)
    loop = "tritonimplicit.linear_solve.loop"

    def capture(steps, progress):
        events.append("capture")
        steps()
        events.append("captured")

    def note(apply, v):
        events.append("product")
        return product(apply, v)

    joined = RowMatvec.joined
    monkeypatch.setattr(f"{loop}.capture", capture)
    monkeypatch.setattr(RowMatvec, "product", note)
    monkeypatch.setattr(
        RowMatvec,
        "joined",
        lambda apply, parts: (events.append("product"), joined(apply, parts))[1],
    )
    monkeypatch.setattr(RowMatvec, "before_capture", lambda apply, count: events.append(count))
    asked = dataclasses.replace(
        solver, rtol=0.0, cuda_graph=True, check_every=4, backend="reference", on_failure="ignore"
    )
    b = torch.randn(50)
    asked.solve(lambda v: scale(v) * v + 0.2 * (v.roll(1) + v.roll(-1)), b)  # many eigenvalues
    at = events.index("capture")
    assert events[at - 1] == products
    assert events[at : events.index("captured")] == ["capture", *["product"] * products]


@pytest.mark.gpu
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_replayed_graph_reads_what_each_product_leaves(solver):
    """Large enough for whole blocks, with several graphs' tables alive."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(300, 401), (7,), (64, 64), (1,)]
    b = tuple(torch.randn(s, generator=generator, device="cuda") for s in shapes)
    solver = dataclasses.replace(solver, rtol=0.0, maxiter=24, on_failure="ignore")

    def matvec(v):
        return tuple(scale(leaf) * leaf for leaf in v)

    expected = solver.solve(matvec, b)
    for check_every in (2, 8):
        asked = dataclasses.replace(solver, cuda_graph=True, check_every=check_every)
        got = asked.solve(matvec, b)
        assert torch.equal(got.iterations, expected.iterations)
        assert all(map(torch.equal, got.value, expected.value))


@pytest.mark.gpu
def test_a_replayed_graph_keeps_a_result_that_the_next_product_writes_over():
    """BiCGSTAB has two products an iteration, here in one buffer."""
    generator = torch.Generator("cuda").manual_seed(0)
    b = tuple(torch.randn(s, generator=generator, device="cuda") for s in [(300, 401), (7,)])
    solver = BiCGSTAB(rtol=0.0, maxiter=24, on_failure="ignore")
    buffers = tuple(torch.empty_like(leaf) for leaf in b)

    def fresh(v):
        return tuple(scale(leaf) * leaf for leaf in v)

    def in_one_buffer(v):
        return tuple(torch.mul(scale(x), x, out=out) for x, out in zip(v, buffers, strict=True))

    expected = solver.solve(fresh, b)
    got = dataclasses.replace(solver, cuda_graph=True, check_every=4).solve(in_one_buffer, b)
    assert torch.equal(got.iterations, expected.iterations)
    assert all(map(torch.equal, got.value, expected.value))


@pytest.mark.gpu
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_backward_pass_in_graphs(solver):
    """The products that are captured are replays of autograd's."""
    shapes = [(40, 25), (7,)]
    theta = tuple(torch.ones(s, device="cuda", requires_grad=True) for s in shapes)

    def optimality(x, theta):
        return tuple(scale(a) * a + 0.1 * a**3 - b for a, b in zip(x, theta, strict=True))

    def newton(x, theta):
        for _ in range(30):
            x = tuple(
                a - (scale(a) * a + 0.1 * a**3 - b) / (scale(a) + 0.3 * a**2)
                for a, b in zip(x, theta, strict=True)
            )
        return x

    def gradients(**fields):
        solve = dataclasses.replace(solver, rtol=0.0, maxiter=24, on_failure="ignore", **fields)
        root = custom_root(optimality, argnums=1, solve=solve)(newton)
        start = tuple(torch.zeros_like(t) for t in theta)
        return torch.autograd.grad(sum(t.square().sum() for t in root(start, theta)), theta)

    expected, got = gradients(), gradients(cuda_graph=True, check_every=4)
    assert all(map(torch.equal, got, expected))
