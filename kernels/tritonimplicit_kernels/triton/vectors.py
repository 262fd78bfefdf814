"""How a kernel reads a block of a vector that its step only reads: from rows, or from leaves.

Rows are (B, ld) of any floating point dtype. Leaves are read where they lie, through a table that
`tritonimplicit_kernels.leaves` describes; its dtype, int64, tells it from rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonimplicit_kernels import leaves

_GROUP = tl.constexpr(leaves.GROUP)
_RECORD = tl.constexpr(leaves.RECORD)
_FLOAT32, _FLOAT16, _BFLOAT16, _FLOAT64 = (tl.constexpr(i) for i in range(len(leaves.DTYPES)))


@triton.jit
def read_block(v_ptr, b, ld, s, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Return elements s to s + BLOCK of row b, which has as many, converted to `dtype`.

    s is a multiple of 16.
    """
    offsets = s + tl.arange(0, BLOCK).to(tl.int64)
    if v_ptr.dtype.element_ty == tl.int64:
        record = _record(v_ptr, s)
        address = _address(record, b)
        # Of one leaf, and aligned: wide loads. Else each element by itself.
        if (s + BLOCK <= tl.load(record + 2)) & (address % 16 == 0):
            block = _whole(address, tl.load(record + 3), offsets, dtype)
        else:
            block = _pieces(v_ptr, b, offsets, offsets < ld, dtype)
    else:
        block = tl.load(v_ptr + b * ld + offsets).to(dtype)
    return block


@triton.jit
def read_tail(v_ptr, b, ld, s, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Return elements s to s + BLOCK of row b as `read_block` does, zero beyond the row's end."""
    offsets = s + tl.arange(0, BLOCK).to(tl.int64)
    if v_ptr.dtype.element_ty == tl.int64:
        block = _pieces(v_ptr, b, offsets, offsets < ld, dtype)
    else:
        block = tl.load(v_ptr + b * ld + offsets, mask=offsets < ld, other=0.0).to(dtype)
    return block


@triton.jit
def _record(table_ptr, offsets, mask=None, other=None):
    """Return where the records of the leaves are whose these elements of a row are."""
    owners_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.int32))
    owners = tl.load(owners_ptr + offsets // _GROUP, mask=mask, other=other)
    return table_ptr + 1 + owners.to(tl.int64) * _RECORD


@triton.jit
def _address(record, b):
    """Return the address that element 0 of row b would have, were the leaf all of the row."""
    return tl.load(record) + b * tl.load(record + 1)


@triton.jit
def _whole(address, code, offsets, dtype: tl.constexpr):
    """Load from one leaf, where its memory is aligned."""
    if code == _FLOAT32:
        block = _aligned(address, offsets, tl.float32, dtype)
    elif code == _FLOAT16:
        block = _aligned(address, offsets, tl.float16, dtype)
    elif dtype == tl.float64 and code == _FLOAT64:
        block = _aligned(address, offsets, tl.float64, dtype)
    else:
        block = _aligned(address, offsets, tl.bfloat16, dtype)
    return block


@triton.jit
def _aligned(address, offsets, leaf: tl.constexpr, dtype: tl.constexpr):
    # As many elements a load as of `dtype`: were they more, the vectors beside this one would have
    # to change places among the threads.
    width: tl.constexpr = 16 * leaf.primitive_bitwidth // dtype.primitive_bitwidth
    leaf_ptr = tl.multiple_of(address.to(tl.pointer_type(leaf)), width)
    return tl.load(leaf_ptr + offsets).to(dtype)


@triton.jit
def _pieces(table_ptr, b, offsets, mask, dtype: tl.constexpr):
    """Load each element from the leaf whose it is; padding is zero."""
    record = _record(table_ptr, offsets, mask, 0)
    address = _address(record, b)
    mask = mask & (offsets < tl.load(record + 2))
    code = tl.load(record + 3)
    block = _of_dtype(address, offsets, mask & (code == _FLOAT32), tl.float32, dtype)
    half = _of_dtype(address, offsets, mask & (code == _FLOAT16), tl.float16, dtype)
    block = tl.where(code == _FLOAT16, half, block)
    half = _of_dtype(address, offsets, mask & (code == _BFLOAT16), tl.bfloat16, dtype)
    block = tl.where(code == _BFLOAT16, half, block)
    if dtype == tl.float64:
        double = _of_dtype(address, offsets, mask & (code == _FLOAT64), tl.float64, dtype)
        block = tl.where(code == _FLOAT64, double, block)
    return block


@triton.jit
def _of_dtype(address, offsets, mask, leaf: tl.constexpr, dtype: tl.constexpr):
    leaf_ptr = address.to(tl.pointer_type(leaf)) + offsets
    return tl.load(leaf_ptr, mask=mask, other=0.0).to(dtype)
