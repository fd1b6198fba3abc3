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
def hidden_zero(count):
    """0, which the compiler cannot tell from a count that it does not know.

    Added to a place after a loop, it keeps addresses from being made before the loop and held in
    registers through it. Without it hyper_attention's dk and dv spill at head dim 256 (Triton 3.8).
    """
    return tl.maximum(count, 0) - count


@triton.jit
def split(index, size):
    """(index // size, index % size) of a program id, in its own 32 bits.

    A launch has fewer than 2**31 programs, so ids need no more; a 64-bit division costs about
    100 instructions a warp.
    """
    outer = index // size
    return outer, index - outer * size
