# mypy: ignore-errors
"""Triton helpers with no op in them: 64-bit offsets and program ids."""

import triton
import triton.language as tl


@triton.jit
def offset(index, stride):
    """`index * stride` in elements, 64-bit; `index` is a 32- or 64-bit scalar or tensor."""
    # Widened before the product: 32-bit operands still make one wide multiply.
    return tl.cast(index, tl.int64) * stride


@triton.jit
def split(index, size):
    """(index // size, index % size) of a program id, in its own 32 bits.

    A launch has fewer than 2**31 programs, so ids need no more; a 64-bit division costs about
    100 instructions a warp.
    """
    outer = index // size
    return outer, index - outer * size
