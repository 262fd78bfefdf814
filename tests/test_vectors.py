"""The pytree <-> (B, ld) layout."""

import math

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonimplicit.vectors import Layout

shapes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(deadline=None)  # the first tensor operation of a process takes seconds
@given(shapes=shapes, batch=st.lists(st.integers(1, 3), max_size=2).map(tuple))
def test_flatten_and_unflatten_are_inverse(shapes, batch):
    tree = {str(i): torch.randn((*batch, *shape)) for i, shape in enumerate(shapes)}
    layout = Layout.of(tree, batch_ndim=len(batch))
    rows = layout.flatten(tree, "tree")
    assert rows.shape == (math.prod(batch), layout.ld)
    assert layout.n == sum(math.prod(shape) for shape in shapes)
    assert all(start % 16 == 0 for start in layout.starts) and layout.ld % 16 == 0
    # Padding is zero: the rows' squares add up to the leaves' alone.
    total = sum(leaf.double().square().sum() for leaf in tree.values())
    torch.testing.assert_close(rows.double().square().sum(), total)
    for got, leaf in zip(
        optree.tree_leaves(layout.unflatten(rows)), optree.tree_leaves(tree), strict=True
    ):
        assert torch.equal(got, leaf)


def test_a_row_holds_one_system():
    tree = (torch.arange(6.0).view(2, 3), torch.tensor([[10.0], [20.0]]))
    layout = Layout.of(tree, batch_ndim=1)
    rows = layout.flatten(tree, "tree")
    assert rows[1, :3].tolist() == [3, 4, 5] and rows[1, 16].item() == 20


def test_leaves_of_the_flat_buffer_are_views():
    layout = Layout.of((torch.zeros(3), torch.zeros(2, 2)))
    rows = layout.zeros()
    rows += 1
    first, second = layout.unflatten(rows)
    rows += 1
    assert first.tolist() == [2, 2, 2] and second.sum() == 8


@pytest.mark.parametrize("batch_ndim", [0, 1, 2])
def test_rows_may_lie_apart(batch_ndim):
    tree = (torch.randn(2, 3, 5), torch.randn(2, 3), torch.randn(2, 3, 4, 7))
    layout = Layout.of(tree, batch_ndim)
    rows = torch.zeros(layout.systems, 4, layout.ld)[:, 2]  # of a basis of several vectors a system
    rows.copy_(layout.flatten(tree, "tree"))
    leaves = layout.unflatten(rows)
    assert all(map(torch.equal, leaves, tree))
    leaves[2].zero_()
    assert not rows[:, layout.starts[2] :].any() and torch.equal(leaves[0], tree[0])


def test_one_fitting_contiguous_leaf_is_read_in_place():
    leaf = torch.randn(4, 32)
    layout = Layout.of(leaf, batch_ndim=1)
    assert layout.gather(leaf, "leaf").data_ptr() == leaf.data_ptr()


@pytest.mark.parametrize(
    "leaf",
    [torch.randn(33)[1:], torch.randn(32, 4).T, torch.randn(1).expand(4, 32), torch.randn(4, 30)],
    ids=["unaligned", "transposed", "expanded", "odd-sized"],
)
def test_any_other_leaf_is_copied(leaf):
    layout = Layout.of(leaf)
    rows = layout.gather(leaf, "leaf")
    assert rows.data_ptr() != leaf.data_ptr()
    assert torch.equal(layout.unflatten(rows), leaf)


def test_the_working_precision_is_fp32_for_half_and_fp64_where_a_leaf_is():
    half = torch.randn(3, dtype=torch.bfloat16)
    layout = Layout.of(half)
    assert layout.dtype is torch.float32
    assert layout.unflatten(layout.flatten(half, "half")).dtype is torch.bfloat16
    assert Layout.of((torch.zeros(1), torch.zeros(1, dtype=torch.float64))).dtype is torch.float64


def test_none_leaves_and_0_dim_leaves_keep_their_place():
    tree = {"a": torch.tensor(2.0), "b": None, "c": [torch.ones(2)]}
    layout = Layout.of(tree)
    back = layout.unflatten(layout.flatten(tree, "tree"))
    assert back["a"].shape == () and back["b"] is None and back["c"][0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("tree", "batch_ndim", "error", "message"),
    [
        ((), 0, ValueError, "without tensors"),
        ({"a": None}, 0, ValueError, "without tensors"),
        (torch.zeros(0), 0, ValueError, "no elements"),
        (torch.zeros(0, 3), 1, ValueError, "no elements"),
        ({"a": torch.zeros(2), "b": 1.0}, 0, TypeError, r"b\['b'\] is a float"),
        (torch.zeros(2, dtype=torch.long), 0, TypeError, "int64"),
        (torch.zeros(2, dtype=torch.complex64), 0, TypeError, "complex64"),
        (torch.eye(2).to_sparse(), 0, TypeError, "sparse"),
        (torch.zeros(()), 1, ValueError, "batch_ndim=1"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), 1, ValueError, r"b\[1\] has shape \(3, 3\)"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), 0, ValueError, "on meta"),
    ],
)
def test_what_is_no_vector_is_refused(tree, batch_ndim, error, message):
    with pytest.raises(error, match=message):
        Layout.of(tree, batch_ndim)


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ((torch.zeros(3),), TypeError, "structure"),
        ([torch.zeros(3), torch.zeros(3)], TypeError, "structure"),
        ((torch.zeros(3), torch.zeros(2)), ValueError, r"shape \(2,\) where b has \(3,\)"),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.float64)), TypeError, "float64"),
        ((torch.zeros(3), 1.0), TypeError, "float, not a tensor"),
        ((torch.zeros(3), torch.zeros(3, device="meta")), ValueError, "meta"),
    ],
)
def test_what_does_not_fit_the_layout_is_refused(tree, error, message):
    layout = Layout.of((torch.zeros(3), torch.zeros(3)))
    with pytest.raises(error, match=message):
        layout.leaves_of(tree, "the tree")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_number_that_rounds_to_the_largest_of_its_dtype_is_none_too_large(dtype):
    """A number overflows from half a unit beyond the largest on: 65520 in float16, not 65504."""
    largest = torch.finfo(dtype).max
    unit = torch.finfo(dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1)
    beyond = largest + unit / 2
    values = [[largest], [largest + unit / 4], [beyond], [-beyond]]
    rows = torch.tensor(values, dtype=torch.float64)
    tree = {"a": torch.zeros(4, 1, dtype=dtype), "b": torch.zeros(4, 1, dtype=torch.float64)}
    layout = Layout.of(tree, batch_ndim=1)
    padded = layout.zeros()
    padded[:, layout.starts[0], None] = rows  # the place of a
    assert layout.overflown(padded).tolist() == [False, False, True, True]
    assert layout.unflatten(padded)["a"].isinf().flatten().tolist() == [False, False, True, True]
