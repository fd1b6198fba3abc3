# mypy: ignore-errors
"""What the attention kernels share: tile sizes and their choice, the online softmax, the scale."""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._tiles import offset

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Beyond it tiles of fp32 with TF32 products spill.
TF32_HEAD_DIM = 128
# All that a thread can have: without the number ptxas spills a few for more threads at a time.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Config:
    """Launch sizes: BLOCK_M queries by BLOCK_N keys a tile.

    block_c: columns of the head dim that the query kernel takes at a time for products of rows.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_c: int = 256


@triton.jit
def head_of(ptr, pid_b, pid_h, strides):
    """Pointer to the first row of a head."""
    return ptr + offset(pid_b, strides[0]) + offset(pid_h, strides[1])


@triton.jit
def key_places(
    base, memory_base, strides, memory_strides, index, len_m, offs_d, HAS_MEMORY: tl.constexpr
):  # fmt: skip
    """Pointers `[rows, len(offs_d)]` of keys `index`, counted through memory and current ones."""
    ptrs = base + offset(index - len_m, strides[2])[:, None] + offset(offs_d, strides[3])[None, :]
    if HAS_MEMORY:
        # A choice of pointers, not of offsets: those would lose what is known of the alignment.
        old = memory_base + offset(index, memory_strides[2])[:, None]
        old += offset(offs_d, memory_strides[3])[None, :]
        ptrs = tl.where((index < len_m)[:, None], old, ptrs)
    return ptrs


@triton.jit
def scale_of(parts, ACC: tl.constexpr):
    """The scale from two fp32 parts: a kernel gets Python floats in fp32, fp64 needs both."""
    return tl.cast(parts[0], ACC) + tl.cast(parts[1], ACC)


@triton.jit
def online_softmax(
    acc, row_max, row_sum, score, v, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(acc, row_max, row_sum) after a further tile of scores (log2) and values.

    MASKED: whether scores may be -inf.
    """
    new_max = tl.maximum(row_max, tl.max(score, 1))
    # A row with every key masked has new_max = -inf; subtracting it from itself is NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    p = tl.exp2(score - base[:, None])
    decay = tl.exp2(row_max - base)
    row_sum = row_sum * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, new_max, row_sum


def configs(table: dict, tensors: Sequence[torch.Tensor]) -> tuple[Config, ...]:
    """The configs of a table that fit these tensors, the shipped one first."""
    device = tensors[0].device
    old = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9
    kind = "any"
    if all(_in_pieces(t) for t in tensors):
        kind = "ampere" if old else "fast"
    if tensors[0].dtype.itemsize > 2:
        kind = "wide" if precision(tensors[0]) == "ieee" else "tf32"
    return next(found for most, found in table[kind].items() if tensors[0].shape[-1] <= most)


def of_tables(table: dict) -> Iterator[tuple[str, str, int, Config]]:
    """(kind, dtype, head dim, config) of all that `configs` can choose: a config's largest head dim
    and one in the middle of its range."""
    dtypes = {"wide": ("fp32",), "tf32": ("tf32",)}
    for kind, sizes in table.items():
        for most, found in sizes.items():
            for config in found:
                for dtype in dtypes.get(kind, ("bf16", "fp16")):
                    yield kind, dtype, most, config
                    yield kind, dtype, most - 24, config


def _in_pieces(tensor: torch.Tensor) -> bool:
    """Whether the compiler knows that rows start at multiples of 16 bytes and have no gaps."""
    *steps, last = tensor.stride()
    return last == 1 and tensor.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in steps)


def precision(tensor: torch.Tensor) -> str:
    if tensor.dtype != torch.float32 or tensor.shape[-1] > TF32_HEAD_DIM:
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def scale_parts(scale: float) -> tuple[float, float]:
    """The scale as a sum of two fp32 numbers."""
    high = ctypes.c_float(scale).value
    return high, scale - high


def columns(head_dim: int, config: Config) -> int:
    """BLOCK_C of a kernel that takes it."""
    return min(config.block_c, triton.next_power_of_2(head_dim))


def launch_options(query: torch.Tensor, config: Config) -> dict:
    """What every attention kernel is launched with."""
    head_dim = query.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": precision(query),
        "ACC": tl.float64 if query.dtype == torch.float64 else tl.float32,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": MAX_REGISTERS,
    }


def row_values(query: torch.Tensor) -> torch.Tensor:
    """`[B, H, L]` for lse and D, whose strides the kernels take to be equal."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty(query.shape[:3], dtype=wide, device=query.device)
