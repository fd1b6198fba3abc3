# mypy: ignore-errors
"""The levels of a plan in a table, for kernels that take all of them in one launch.

A program knows its place among the tiles, or segments, of all levels; the table says which level
that is, and where it lies.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._kept import kept
from .plan import TILE, Spec, hyper_levels

# Columns of `level_table`, of so many levels at most: each is twice the last.
LEVELS = tl.constexpr(32)
COLUMNS = (
    SEGMENT, Q_PLACE, K_PLACE, STEP, Q_TILE, K_TILE, Q_LENGTH, K_LENGTH, Q_BEGIN, K_BEGIN, QUERIES,
    KEYS, Q_OFFSET, K_OFFSET, BLOCK_OFFSET,
) = [tl.constexpr(i) for i in range(15)]  # fmt: skip


@triton.jit
def level_of(table_ptr, column, place):
    """Which level has a place, in a column that says where levels begin."""
    firsts = tl.load(table_ptr + column * LEVELS + tl.arange(0, LEVELS))
    return tl.sum((firsts <= place).to(tl.int32), 0) - 1


@triton.jit
def of_level(table_ptr, column, level):
    """A level's number in a column, 64-bit."""
    return tl.load(table_ptr + column * LEVELS + level)


class Tiles(NamedTuple):
    """Tiles of the queries and of the keys. Both are cut in two runs, what comes before the causal
    square and the square: where, and after how many tiles."""

    queries: int
    keys: int
    cuts: tuple[int, int]
    firsts: tuple[int, int]


def tiles_of(spec: Spec, num_queries: int, num_keys: int, num_memory: int) -> Tiles:
    """The tiles that are hashed and counted together."""
    lengths = num_queries, num_memory + num_keys
    square = min(num_queries, num_keys) if spec.is_causal else max(lengths)
    cuts = [max(length - square, 0) for length in lengths]
    firsts = [triton.cdiv(cut, TILE) for cut in cuts]
    q_tiles, k_tiles = (
        first + triton.cdiv(length - cut, TILE)
        for length, cut, first in zip(lengths, cuts, firsts, strict=True)
    )
    return Tiles(q_tiles, k_tiles, tuple(cuts), tuple(firsts))


class LevelTable(NamedTuple):
    """What one launch knows of all levels: numbers `[columns, LEVELS]`, int64, on the device; and
    how many segments, tiles of queries and tiles of keys they have, each level its own."""

    numbers: torch.Tensor
    segments: int
    q_places: int
    k_places: int


@kept(64)
def level_table(
    spec: Spec, num_queries: int, num_keys: int, num_memory: int, device: torch.device
) -> LevelTable:
    """The levels that are estimated. Kept; do not write into it."""
    sizes = num_queries, num_keys, num_memory
    q_tiles, k_tiles, cuts, firsts = tiles_of(spec, *sizes)
    # No place is as far as where the levels that do not exist begin.
    shape = len(COLUMNS), LEVELS.value
    numbers = torch.full(shape, 2**62, dtype=torch.int64, device="cpu")
    segments = q_places = k_places = 0
    for i, level in enumerate(hyper_levels(spec, *sizes)):
        # A segment of the causal square begins at a tile of the second run; others at the first.
        is_square = level.step > 0
        q_length = triton.cdiv(level.num_queries, TILE) if is_square else q_tiles
        k_length = triton.cdiv(level.num_keys, TILE) if spec.is_causal else k_tiles
        # In the order of the columns.
        found = (
            segments, q_places, k_places, level.step,
            firsts[0] + (level.q_begin - cuts[0]) // TILE if is_square else 0,
            firsts[1] + (level.k_begin - cuts[1]) // TILE if is_square else 0,
            q_length, k_length, level.q_begin, level.k_begin, level.num_queries, level.num_keys,
            level.q_offset, level.k_offset, level.block_offset,
        )  # fmt: skip
        numbers[:, i] = torch.tensor(found, device="cpu")
        segments += level.segments
        q_places += level.segments * q_length
        k_places += level.segments * k_length
    return LevelTable(numbers.to(device), segments, q_places, k_places)
