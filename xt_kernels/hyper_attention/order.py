# mypy: ignore-errors
"""Triton form of a plan: hash, count, scan, place. No sort.

    planes   P_h = C P for each head: the middle and covariance of up to 1024 keys, one program each
    hash     bucket of each token (one byte), and how many of each bucket a tile of 256 tokens has
    scan     where the tokens of (tile, bucket) begin in their segment's order
    order    each token's place, begin + rank among its equals in the tile; and the windows

For clusters, two launches stand for the first:

    seeds    keys in the order of their hashes, and the middles of keys and of queries
    centres  the mean of those sampled keys that are nearest to a seed

Planes and hashes are computed in fp32: products of 16-bit numbers are exact there. The last two
take all levels at once, on hashes and counts that levels share: segments begin at tiles. Scratch is
3 bytes a token at 128 buckets, its hash and its share of a count, and 2 more in each level.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from .._aot import AotCase
from .._attention import MAX_REGISTERS, head_of, key_places
from .._tiles import offset, split
from .level_table import (
    BLOCK_OFFSET,
    K_LENGTH,
    K_OFFSET,
    K_PLACE,
    K_TILE,
    KEYS,
    Q_BEGIN,
    Q_LENGTH,
    Q_OFFSET,
    Q_PLACE,
    Q_TILE,
    QUERIES,
    SEGMENT,
    STEP,
    level_of,
    level_table,
    of_level,
    tiles_of,
)
from .plan import (
    GOLDEN,
    QUERY_BLOCK,
    SAMPLED_TOKENS,
    TILE,
    Choices,
    Spec,
    drawn_places,
    empty_choices,
    hyper_levels,
    with_residual_keys,
)

# Columns of planes: what a dot takes at least.
PLANES = tl.constexpr(16)
TILE_ = tl.constexpr(TILE)
GOLDEN_ = tl.constexpr(GOLDEN)
# Centres that a program makes.
SEEDS = tl.constexpr(16)


@triton.jit
def _sampled(offs, length):
    """Place of sample `offs` of a sequence; see `plan.sampled`. 64-bit, as the products need."""
    return (tl.cast(offs, tl.int64) * GOLDEN_ & 0x7FFFFFFF) * length >> 31


@triton.jit
def _sampled_keys(
    k_base, mk_base, k_strides, mk_strides, len_m, total, offs, mask_d, offs_d,
    SAMPLED: tl.constexpr, HAS_MEMORY: tl.constexpr,
):  # fmt: skip
    """(samples `offs` of all keys, which of them there are), both `[.., BLOCK_D]`."""
    mask = (offs < tl.minimum(total, SAMPLED))[:, None] & mask_d[None, :]
    index = _sampled(offs, total)
    ptrs = key_places(k_base, mk_base, k_strides, mk_strides, index, len_m, offs_d, HAS_MEMORY)
    return tl.load(ptrs, mask=mask, other=0.0), mask


@triton.jit
def _middle_of_keys(
    k_base, mk_base, k_strides, mk_strides, len_m, total, offs_d, mask_d,
    SAMPLED: tl.constexpr, HAS_MEMORY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean of the sampled keys `[BLOCK_D]`, fp32."""
    count = tl.minimum(total, SAMPLED)
    row = tl.arange(0, ROWS)
    middle = tl.zeros_like(mask_d.to(tl.float32))
    for first in range(0, count, ROWS):
        keys, _ = _sampled_keys(
            k_base, mk_base, k_strides, mk_strides, len_m, total, first + row, mask_d, offs_d,
            SAMPLED, HAS_MEMORY,
        )  # fmt: skip
        middle += tl.sum(keys.to(tl.float32), 0)
    return middle / count


@triton.jit
def _middle_of_queries(
    q_base, q_strides, len_q, offs_d, mask_d, SAMPLED: tl.constexpr, ROWS: tl.constexpr
):
    """Mean of the sampled queries `[BLOCK_D]`, fp32."""
    count = tl.minimum(len_q, SAMPLED)
    row = tl.arange(0, ROWS)
    middle = tl.zeros_like(mask_d.to(tl.float32))
    for first in range(0, count, ROWS):
        mask = (first + row < count)[:, None] & mask_d[None, :]
        ptrs = q_base + offset(_sampled(first + row, len_q), q_strides[2])[:, None]
        ptrs += offset(offs_d, q_strides[3])[None, :]
        middle += tl.sum(tl.load(ptrs, mask=mask, other=0.0).to(tl.float32), 0)
    return middle / count


@triton.jit
def _gray_rank(signs, place):
    """Rank along the Gray code of bits `signs` at places `place`; see `plan.gray_rank`."""
    code = tl.sum(signs.to(tl.int32) << place[None, :], 1)
    code = code ^ (code >> 1)
    code = code ^ (code >> 2)
    return code ^ (code >> 4)


@triton.jit
def _hyper_planes_kernel(
    q_ptr, k_ptr, mk_ptr, random_ptr, planes_ptr, threshold_ptr,
    q_strides, k_strides, mk_strides, random_strides, num_heads, group, len_q, len_k, len_m, bits,
    SAMPLED: tl.constexpr, HAS_MEMORY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A plane of a head, a column of `[D, 16]`, and its thresholds for queries and keys `[2, 16]`.

    Each program finds the middles again: sharing them would take a launch more.
    """
    pid_bh, pid_p = split(tl.program_id(0), bits)
    pid_b, pid_h = split(pid_bh, num_heads)
    pid_g = pid_h // group
    offs_d, row = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    mask_d = offs_d < HEAD_DIM
    total = len_m + len_k
    k_base = head_of(k_ptr, pid_b, pid_g, k_strides)
    mk_base = head_of(mk_ptr, pid_b, pid_g, mk_strides)
    q_base = head_of(q_ptr, pid_b, pid_h, q_strides)
    middle = _middle_of_keys(
        k_base, mk_base, k_strides, mk_strides, len_m, total, offs_d, mask_d, SAMPLED, HAS_MEMORY,
        ROWS,
    )  # fmt: skip
    q_middle = _middle_of_queries(q_base, q_strides, len_q, offs_d, mask_d, SAMPLED, ROWS)

    random_ptrs = random_ptr + offset(pid_g, random_strides[0]) + offset(pid_p, random_strides[2])
    random = tl.load(random_ptrs + offset(offs_d, random_strides[1]), mask=mask_d, other=0.0)
    plane = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, tl.minimum(total, SAMPLED), ROWS):
        keys, mask = _sampled_keys(
            k_base, mk_base, k_strides, mk_strides, len_m, total, first + row, mask_d, offs_d,
            SAMPLED, HAS_MEMORY,
        )  # fmt: skip
        keys = tl.where(mask, keys.to(tl.float32) - middle[None, :], 0.0)
        side = tl.sum(keys * random[None, :], 1)
        plane += tl.sum(keys * side[:, None], 0)

    length = tl.sqrt(tl.sum(plane * plane, 0))
    # A constant sequence has no covariance; any plane does.
    plane = tl.where(length > 0.0, plane, random)
    plane = plane / tl.sqrt(tl.sum(plane * plane, 0))
    plane = plane.to(planes_ptr.dtype.element_ty)
    place = offset(pid_bh, BLOCK_D * PLANES) + offs_d * PLANES + pid_p
    tl.store(planes_ptr + place, plane)
    rounded = plane.to(tl.float32)
    threshold_ptrs = threshold_ptr + offset(pid_bh, 2 * PLANES) + pid_p
    tl.store(threshold_ptrs, tl.sum(rounded * q_middle, 0))
    tl.store(threshold_ptrs + PLANES, tl.sum(rounded * middle, 0))


@triton.jit
def _hash_seeds(
    k_base, mk_base, k_strides, mk_strides, len_m, total, middle, random, seed, mask_d, offs_d,
    offs_p, bits, SAMPLED: tl.constexpr, HAS_MEMORY: tl.constexpr,
):  # fmt: skip
    """(rank of the hash, row `[.., BLOCK_D]`) of seeds: samples less the middle, rounded."""
    # Fewer samples than seeds begin again.
    offs = seed % tl.minimum(total, SAMPLED)
    keys, mask = _sampled_keys(
        k_base, mk_base, k_strides, mk_strides, len_m, total, offs, mask_d, offs_d, SAMPLED,
        HAS_MEMORY,
    )  # fmt: skip
    rows = tl.where(mask, keys.to(tl.float32) - middle[None, :], 0.0).to(k_base.dtype.element_ty)
    sides = tl.dot(rows.to(tl.float32), random, input_precision="ieee")
    return _gray_rank((sides > 0.0) & (offs_p < bits)[None, :], offs_p), rows


@triton.jit
def _hyper_seeds_kernel(
    q_ptr, k_ptr, mk_ptr, random_ptr, seed_ptr, middle_ptr,
    q_strides, k_strides, mk_strides, random_strides, num_heads, group, len_q, len_k, len_m, bits,
    BUCKETS: tl.constexpr, SAMPLED: tl.constexpr, HAS_MEMORY: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """16 seeds of a head at their places `[.., BLOCK_D]`; the middles of queries and keys `[2, D]`.

    Places are ranks of (hash, sample): counted, not sorted.
    """
    pid_bh, block = split(tl.program_id(0), tl.cdiv(BUCKETS, SEEDS))
    pid_b, pid_h = split(pid_bh, num_heads)
    pid_g = pid_h // group
    offs_d, offs_p, offs_s = tl.arange(0, BLOCK_D), tl.arange(0, PLANES), tl.arange(0, SEEDS)
    mask_d = offs_d < HEAD_DIM
    total = len_m + len_k
    k_base = head_of(k_ptr, pid_b, pid_g, k_strides)
    mk_base = head_of(mk_ptr, pid_b, pid_g, mk_strides)
    middle = _middle_of_keys(
        k_base, mk_base, k_strides, mk_strides, len_m, total, offs_d, mask_d, SAMPLED, HAS_MEMORY,
        ROWS,
    )  # fmt: skip
    if block == 0:
        q_base = head_of(q_ptr, pid_b, pid_h, q_strides)
        q_middle = _middle_of_queries(q_base, q_strides, len_q, offs_d, mask_d, SAMPLED, ROWS)
        middle_ptrs = middle_ptr + offset(pid_bh, 2 * BLOCK_D) + offs_d
        tl.store(middle_ptrs, q_middle)
        tl.store(middle_ptrs + BLOCK_D, middle)

    random_ptrs = random_ptr + offset(pid_g, random_strides[0])
    random_ptrs += offset(offs_d, random_strides[1])[:, None]
    random_ptrs += offset(offs_p, random_strides[2])[None, :]
    mask_r = mask_d[:, None] & (offs_p < bits)[None, :]
    random = tl.load(random_ptrs, mask=mask_r, other=0.0)
    own = block * SEEDS + offs_s
    own_hash, rows = _hash_seeds(
        k_base, mk_base, k_strides, mk_strides, len_m, total, middle, random, own, mask_d, offs_d,
        offs_p, bits, SAMPLED, HAS_MEMORY,
    )  # fmt: skip
    rank = tl.zeros([SEEDS], tl.int32)
    for first in range(0, BUCKETS, SEEDS):
        other = first + offs_s
        found, _ = _hash_seeds(
            k_base, mk_base, k_strides, mk_strides, len_m, total, middle, random, other, mask_d,
            offs_d, offs_p, bits, SAMPLED, HAS_MEMORY,
        )  # fmt: skip
        is_tie = (found[None, :] == own_hash[:, None]) & (other[None, :] < own[:, None])
        is_before = (found[None, :] < own_hash[:, None]) | is_tie
        rank += tl.sum((is_before & (other < BUCKETS)[None, :]).to(tl.int32), 1)
    seed_ptrs = seed_ptr + offset(pid_bh * BUCKETS + rank, BLOCK_D)[:, None] + offs_d[None, :]
    tl.store(seed_ptrs, rows, mask=(own < BUCKETS)[:, None])


@triton.jit
def _nearest(
    x, centre_ptrs, middle, offs_d, BUCKETS: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The centre `[ROWS]` nearest to each of x - middle; see `plan.nearest`."""
    # More centres at a time spill.
    COLUMNS: tl.constexpr = max(16, 4096 * 16 // BLOCK_D // x.dtype.primitive_bitwidth)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    found = tl.zeros([ROWS], tl.int32)
    for first in range(0, BUCKETS, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < BUCKETS
        places = column[None, :] * BLOCK_D + offs_d[:, None]
        centres = tl.load(centre_ptrs + places, mask=mask[None, :], other=0.0)
        wide = centres.to(tl.float32)
        limit = tl.sum(wide * (middle[:, None] + 0.5 * wide), 0)
        scores = tl.dot(x, centres, input_precision="ieee") - limit[None, :]
        scores = tl.where(mask[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        found = tl.where(top > best, first + tl.argmax(scores, 1), found)
        best = tl.maximum(best, top)
    return found


@triton.jit
def _hyper_centres_kernel(
    k_ptr, mk_ptr, seed_ptr, middle_ptr, centre_ptr, k_strides, mk_strides, num_heads, group,
    len_k, len_m,
    BUCKETS: tl.constexpr, SAMPLED: tl.constexpr, HAS_MEMORY: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """16 centres of a head: means of the samples nearest to their seeds, less the middle."""
    pid_bh, block = split(tl.program_id(0), tl.cdiv(BUCKETS, SEEDS))
    pid_b, pid_h = split(pid_bh, num_heads)
    pid_g = pid_h // group
    offs_d, row = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    own = block * SEEDS + tl.arange(0, SEEDS)
    mask_d = offs_d < HEAD_DIM
    total = len_m + len_k
    count = tl.minimum(total, SAMPLED)
    k_base = head_of(k_ptr, pid_b, pid_g, k_strides)
    mk_base = head_of(mk_ptr, pid_b, pid_g, mk_strides)
    middle = tl.load(middle_ptr + offset(pid_bh, 2 * BLOCK_D) + BLOCK_D + offs_d)
    seeds = seed_ptr + offset(pid_bh, BUCKETS * BLOCK_D)
    sums = tl.zeros([SEEDS, BLOCK_D], tl.float32)
    members = tl.zeros([SEEDS], tl.int32)
    for first in range(0, count, ROWS):
        keys, _ = _sampled_keys(
            k_base, mk_base, k_strides, mk_strides, len_m, total, first + row, mask_d, offs_d,
            SAMPLED, HAS_MEMORY,
        )  # fmt: skip
        found = _nearest(keys, seeds, middle, offs_d, BUCKETS, BLOCK_D, ROWS)
        is_mine = (own[:, None] == found[None, :]) & (first + row < count)[None, :]
        sums += tl.dot(is_mine.to(keys.dtype), keys, input_precision="ieee")
        members += tl.sum(is_mine.to(tl.int32), 1)
    places = own[:, None] * BLOCK_D + offs_d[None, :]
    mask = (own < BUCKETS)[:, None]
    seed = tl.load(seeds + places, mask=mask, other=0.0).to(tl.float32)
    mean = sums / tl.maximum(members, 1)[:, None] - middle[None, :]
    centres = tl.where((members > 0)[:, None] & mask_d[None, :], mean, seed)
    out = centre_ptr + offset(pid_bh, BUCKETS * BLOCK_D) + places
    tl.store(out, centres.to(centre_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_begin(tile, first_tiles, cut, length):
    """(first token, end) of a tile of a sequence that is cut in two runs at `cut`."""
    early = tile < first_tiles
    begin = tl.where(early, tile * TILE_, cut + (tile - first_tiles) * TILE_)
    return begin, tl.where(early, cut, length)


@triton.jit
def _hyper_hash_kernel(
    q_ptr, k_ptr, mk_ptr, planes_ptr, threshold_ptr, q_code_ptr, k_code_ptr, q_count_ptr,
    k_count_ptr, q_strides, k_strides, mk_strides, num_heads, group, len_q, len_k, len_m,
    q_tiles, k_tiles, q_cut, k_cut, q_first_tiles, k_first_tiles, q_programs, bits,
    BUCKETS: tl.constexpr, CLUSTERED: tl.constexpr, HAS_MEMORY: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Buckets of a tile of one head's queries, or keys, and how many tokens each bucket has.

    If CLUSTERED, planes are centres `[BUCKETS, BLOCK_D]`, and thresholds middles `[2, BLOCK_D]`.
    """
    pid = tl.program_id(0)
    is_key = pid >= q_programs
    tiles = tl.where(is_key, k_tiles, q_tiles)
    pid_bh, tile = split(tl.where(is_key, pid - q_programs, pid), tiles)
    heads = tl.where(is_key, num_heads // group, num_heads)
    pid_b, pid_h = split(pid_bh, heads)
    # The group's keys are hashed with the planes of its first query head: all have the same.
    head = pid_b * num_heads + tl.where(is_key, pid_h * group, pid_h)
    length = tl.where(is_key, len_m + len_k, len_q)
    begin, end = _tile_begin(
        tile,
        tl.where(is_key, k_first_tiles, q_first_tiles),
        tl.where(is_key, k_cut, q_cut),
        length,
    )
    offs_d, offs_p, row = tl.arange(0, BLOCK_D), tl.arange(0, PLANES), tl.arange(0, ROWS)
    mask_d = offs_d < HEAD_DIM
    side = tl.where(is_key, 1, 0)
    if CLUSTERED:
        centres = planes_ptr + offset(head, BUCKETS * BLOCK_D)
        middle = tl.load(threshold_ptr + offset(head * 2 + side, BLOCK_D) + offs_d)
    else:
        place = offset(head, BLOCK_D * PLANES) + offs_d[:, None] * PLANES + offs_p[None, :]
        mask_p = offs_p < bits
        planes = tl.load(planes_ptr + place, mask=mask_p[None, :], other=0.0)
        threshold_ptrs = threshold_ptr + offset(head * 2 + side, PLANES) + offs_p
        threshold = tl.load(threshold_ptrs, mask=mask_p, other=0.0)
    counts = tl.zeros([BUCKETS], tl.int32)
    q_base = head_of(q_ptr, pid_b, pid_h, q_strides)
    k_base = head_of(k_ptr, pid_b, pid_h, k_strides)
    mk_base = head_of(mk_ptr, pid_b, pid_h, mk_strides)
    for first in range(0, TILE_, ROWS):
        index = begin + first + row
        mask = index < end
        q_rows = q_base + offset(index, q_strides[2])[:, None]
        q_rows += offset(offs_d, q_strides[3])[None, :]
        k_rows = key_places(
            k_base, mk_base, k_strides, mk_strides, index, len_m, offs_d, HAS_MEMORY
        )
        ptrs = tl.where(is_key, k_rows, q_rows)
        x = tl.load(ptrs, mask=mask[:, None] & mask_d[None, :], other=0.0)
        if CLUSTERED:
            code = _nearest(x, centres, middle, offs_d, BUCKETS, BLOCK_D, ROWS)
        else:
            sides = tl.dot(x, planes, input_precision="ieee")
            code = _gray_rank((sides > threshold[None, :]) & mask_p[None, :], offs_p)
        out = tl.where(is_key, k_code_ptr, q_code_ptr) + offset(pid_bh, length) + index
        tl.store(out, code.to(tl.uint8), mask=mask)
        counts += tl.histogram(code, BUCKETS, mask=mask)
    count_ptrs = tl.where(is_key, k_count_ptr, q_count_ptr) + offset(pid_bh * tiles + tile, BUCKETS)
    tl.store(count_ptrs + tl.arange(0, BUCKETS), counts)


@triton.jit
def _hyper_scan_kernel(
    table_ptr, q_count_ptr, k_count_ptr, q_base_ptr, k_base_ptr, q_begin_ptr, k_begin_ptr, q_tiles,
    k_tiles, segments, q_places, k_places, q_programs,
    BUCKETS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Where (tile, bucket) begins in its segment's order `[places, buckets]`, and each bucket.

    Buckets begin at `[segments, buckets + 1]` places, the last being the segment's length. Segments
    are those of all levels; so are places, a tile's in each level that has it.
    """
    pid = tl.program_id(0)
    is_key = pid >= q_programs
    pid_bh, place = split(tl.where(is_key, pid - q_programs, pid), segments)
    level = level_of(table_ptr, SEGMENT, place)
    segment = place - of_level(table_ptr, SEGMENT, level)
    tiles = tl.where(is_key, k_tiles, q_tiles)
    length = of_level(table_ptr, tl.where(is_key, K_LENGTH, Q_LENGTH), level)
    first = of_level(table_ptr, tl.where(is_key, K_TILE, Q_TILE), level)
    first += segment * (of_level(table_ptr, STEP, level) // TILE_)
    count = tl.minimum(length, tiles - first)
    first_place = of_level(table_ptr, tl.where(is_key, K_PLACE, Q_PLACE), level)
    # The table's numbers are 64-bit; what counts programs, or tiles of all heads, fits in 32 bits.
    first_place += segment * length + pid_bh * tl.where(is_key, k_places, q_places)
    offs_b, row = tl.arange(0, BUCKETS), tl.arange(0, ROWS)
    counts = tl.where(is_key, k_count_ptr, q_count_ptr)
    counts += (pid_bh * tiles + first) * BUCKETS
    bases = tl.where(is_key, k_base_ptr, q_base_ptr) + first_place * BUCKETS
    total = tl.zeros([BUCKETS], tl.int32)
    for tile in range(0, count, ROWS):
        ptrs = (tile + row)[:, None] * BUCKETS + offs_b[None, :]
        mask = (tile + row < count)[:, None]
        total += tl.sum(tl.load(counts + ptrs, mask=mask, other=0), 0)
    begin = tl.cumsum(total, 0) - total
    begin_ptrs = tl.where(is_key, k_begin_ptr, q_begin_ptr)
    begin_ptrs += offset(pid_bh * segments + place, BUCKETS + 1)
    tl.store(begin_ptrs + offs_b, begin)
    tl.store(begin_ptrs + BUCKETS, tl.sum(total, 0))
    for tile in range(0, count, ROWS):
        ptrs = (tile + row)[:, None] * BUCKETS + offs_b[None, :]
        mask = (tile + row < count)[:, None]
        found = tl.load(counts + ptrs, mask=mask, other=0)
        tl.store(bases + ptrs, begin[None, :] + tl.cumsum(found, 0) - found, mask=mask)
        begin += tl.sum(found, 0)


@triton.jit
def _hyper_order_kernel(
    table_ptr, q_code_ptr, k_code_ptr, q_base_ptr, k_base_ptr, q_begin_ptr, k_begin_ptr,
    q_order_ptr, k_order_ptr, start_ptr, num_heads, group, len_q, total_k, q_tiles, k_tiles, q_cut,
    k_cut, q_first_tiles, k_first_tiles, segments, q_places, k_places, width, q_row, k_row,
    start_row, q_programs,
    BUCKETS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Places the tokens of a tile in the order of its segment; the windows of its query blocks."""
    pid = tl.program_id(0)
    is_key = pid >= q_programs
    places = tl.where(is_key, k_places, q_places)
    pid_bh, place = split(tl.where(is_key, pid - q_programs, pid), places)
    first_place = tl.where(is_key, K_PLACE, Q_PLACE)
    level = level_of(table_ptr, first_place, place)
    # What counts tokens or tiles of one sequence fits in 32 bits.
    step = of_level(table_ptr, STEP, level).to(tl.int32)
    in_level = place - of_level(table_ptr, first_place, level).to(tl.int32)
    segment, tile = split(
        in_level, of_level(table_ptr, tl.where(is_key, K_LENGTH, Q_LENGTH), level).to(tl.int32)
    )
    own = of_level(table_ptr, tl.where(is_key, K_TILE, Q_TILE), level).to(tl.int32)
    own += segment * (step // TILE_) + tile
    tiles = tl.where(is_key, k_tiles, q_tiles)
    length = tl.where(is_key, total_k, len_q)
    begin, end = _tile_begin(
        own, tl.where(is_key, k_first_tiles, q_first_tiles), tl.where(is_key, k_cut, q_cut), length
    )
    offs = tl.arange(0, TILE_)
    index = begin + offs
    # The last segment of queries may end early; its tiles past the last one hold nothing.
    mask = (index < end) & (own < tiles)
    codes = tl.where(is_key, k_code_ptr, q_code_ptr) + offset(pid_bh, length)
    code = tl.load(codes + index, mask=mask, other=0).to(tl.int32)
    rank = tl.zeros([TILE_], tl.int32)
    part = tl.arange(0, PART)
    for first in range(0, TILE_, PART):
        # Tokens past the end come last, so they are before none.
        other = tl.load(codes + begin + first + part, mask=begin + first + part < end, other=0)
        equal = code[:, None] == other.to(tl.int32)[None, :]
        rank += tl.sum((equal & ((first + part)[None, :] < offs[:, None])).to(tl.int32), 1)
    bases = tl.where(is_key, k_base_ptr, q_base_ptr) + offset(pid_bh * places + place, BUCKETS)
    rank += tl.load(bases + code, mask=mask, other=0)
    orders = tl.where(is_key, k_order_ptr, q_order_ptr)
    orders += offset(pid_bh, tl.where(is_key, k_row, q_row))
    orders += of_level(table_ptr, tl.where(is_key, K_OFFSET, Q_OFFSET), level)
    orders += segment * of_level(table_ptr, tl.where(is_key, KEYS, QUERIES), level)
    tl.store(orders + rank, index, mask=mask)

    if not is_key:
        num_queries = of_level(table_ptr, QUERIES, level).to(tl.int32)
        num_keys = of_level(table_ptr, KEYS, level).to(tl.int32)
        num_blocks = tl.cdiv(num_queries, BLOCK)
        block = tile * (TILE_ // BLOCK) + tl.arange(0, TILE_ // BLOCK)
        first = of_level(table_ptr, Q_BEGIN, level).to(tl.int32) + segment * step
        count = tl.minimum(first + num_queries, len_q) - first
        middle = tl.minimum(block * BLOCK + BLOCK // 2, count - 1)
        of_segment = of_level(table_ptr, SEGMENT, level) + segment
        q_begins = q_begin_ptr + (pid_bh * segments + of_segment) * (BUCKETS + 1)
        pid_b, pid_h = split(pid_bh, num_heads)
        pid_bg = pid_b * (num_heads // group) + pid_h // group
        k_begins = k_begin_ptr + (pid_bg * segments + of_segment) * (BUCKETS + 1)
        offs_b = tl.arange(0, BUCKETS)
        ends = tl.load(q_begins + 1 + offs_b)
        bucket = tl.sum((ends[None, :] <= middle[:, None]).to(tl.int32), 1)
        q_from = tl.load(q_begins + bucket)
        q_count = tl.load(q_begins + bucket + 1) - q_from
        k_from = tl.load(k_begins + bucket)
        k_count = tl.load(k_begins + bucket + 1) - k_from
        # 64-bit: both factors may be the length of the sequence.
        ahead = tl.cast(middle - q_from, tl.int64) * k_count // q_count
        start = k_from + ahead.to(tl.int32) - width // 2
        start = tl.minimum(tl.maximum(start, 0), num_keys - width)
        starts = start_ptr + offset(pid_bh, start_row) + segment * num_blocks
        starts += of_level(table_ptr, BLOCK_OFFSET, level)
        tl.store(starts + block, start, mask=block < num_blocks)


def launch_choices(
    spec: Spec,
    query: torch.Tensor,
    key: torch.Tensor,
    memory_key: torch.Tensor | None,
    projections: torch.Tensor,
    seed: int,
) -> Choices:
    """A plan's tensors, as `plan.eager_choices` makes them."""
    batch, heads, len_q, head_dim = query.shape
    groups, len_k = key.shape[1:3]
    has_memory = memory_key is not None and memory_key.shape[2] > 0
    len_m = memory_key.shape[2] if has_memory else 0
    choices = empty_choices(spec, query, key, len_m, seed)
    hyper = hyper_levels(spec, len_q, len_k, len_m)
    if not spec.is_ordered or not hyper or not choices.window_start.numel():
        return choices
    mk = memory_key if has_memory else key
    bits = projections.shape[2]
    buckets = 2**bits
    block_d = triton.next_power_of_2(head_dim)
    common = {"HAS_MEMORY": has_memory, "HEAD_DIM": head_dim, "BLOCK_D": block_d}

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    is_clustered = spec.window == "cluster"
    sizes = (buckets, block_d) if is_clustered else (block_d, PLANES.value)
    planes = empty(batch, heads, *sizes, dtype=query.dtype)
    threshold = empty(batch, heads, 2, sizes[1], dtype=torch.float32)
    samples = {"SAMPLED": SAMPLED_TOKENS, "maxnreg": MAX_REGISTERS, **common}
    inputs = (query, key, mk, projections)
    scalars = (heads, heads // groups, len_q, len_k, len_m, bits)
    if is_clustered:
        seeds = torch.empty_like(planes)
        programs = batch * heads * triton.cdiv(buckets, SEEDS.value)
        _hyper_seeds_kernel[(programs,)](
            *inputs, seeds, threshold, *[t.stride() for t in inputs], *scalars,
            BUCKETS=buckets, ROWS=2048 // block_d, **samples, num_warps=hash_warps(block_d),
        )  # fmt: skip
        _hyper_centres_kernel[(programs,)](
            key, mk, seeds, threshold, planes, key.stride(), mk.stride(), heads, heads // groups,
            len_k, len_m,
            BUCKETS=buckets, ROWS=cluster_rows(query.dtype, block_d), **samples, num_warps=8,
        )  # fmt: skip
        rows, warps = cluster_rows(query.dtype, block_d), 8
    else:
        _hyper_planes_kernel[(batch * heads * bits,)](
            *inputs, planes, threshold, *[t.stride() for t in inputs], *scalars,
            ROWS=2048 // block_d, **samples, num_warps=8,
        )  # fmt: skip
        rows, warps = rows_at_a_time(query.dtype, block_d), hash_warps(block_d)

    sizes = len_q, len_k, len_m
    q_tiles, k_tiles, cuts, firsts = tiles_of(spec, *sizes)
    q_code = empty(batch, heads, len_q, dtype=torch.uint8)
    k_code = empty(batch, groups, len_m + len_k, dtype=torch.uint8)
    q_count, k_count = empty(batch, heads, q_tiles, buckets), empty(batch, groups, k_tiles, buckets)
    q_programs, k_programs = batch * heads * q_tiles, batch * groups * k_tiles
    _hyper_hash_kernel[(q_programs + k_programs,)](
        query, key, mk, planes, threshold, q_code, k_code, q_count, k_count,
        query.stride(), key.stride(), mk.stride(), heads, heads // groups, len_q, len_k, len_m,
        q_tiles, k_tiles, *cuts, *firsts, q_programs, bits,
        BUCKETS=buckets, CLUSTERED=is_clustered, ROWS=rows, **common, num_warps=warps,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip

    table, segments, q_places, k_places = level_table(spec, *sizes, query.device)
    q_base, k_base = empty(batch, heads, q_places, buckets), empty(batch, groups, k_places, buckets)
    q_begin = empty(batch, heads, segments, buckets + 1)
    k_begin = empty(batch, groups, segments, buckets + 1)
    q_heads, k_heads = batch * heads, batch * groups
    _hyper_scan_kernel[((q_heads + k_heads) * segments,)](
        table, q_count, k_count, q_base, k_base, q_begin, k_begin, q_tiles, k_tiles, segments,
        q_places, k_places, q_heads * segments,
        BUCKETS=buckets, ROWS=32, num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    orders = choices[:3]
    _hyper_order_kernel[(q_heads * q_places + k_heads * k_places,)](
        table, q_code, k_code, q_base, k_base, q_begin, k_begin, *orders,
        heads, heads // groups, len_q, len_m + len_k, q_tiles, k_tiles, *cuts, *firsts, segments,
        q_places, k_places, spec.block_size, *[t.stride(1) for t in orders], q_heads * q_places,
        BUCKETS=buckets, BLOCK=QUERY_BLOCK, PART=32, num_warps=8, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    drawn = drawn_places(spec, *sizes, seed, key.device)
    return with_residual_keys(choices, drawn.in_order)


def hash_warps(block_d: int) -> int:
    """Warps of the hash, of which wide rows take more."""
    return 8 if block_d > 128 else 4


def rows_at_a_time(dtype: torch.dtype, block_d: int) -> int:
    """Rows of a tile that fit in registers beside the planes."""
    return max(16, 2048 // block_d * 2 // dtype.itemsize)


def cluster_rows(dtype: torch.dtype, block_d: int) -> int:
    """Rows that look for their centre together: as many as fit, for each reads all centres."""
    rows = max(16, 8192 // block_d // dtype.itemsize)
    return min(rows, 64) if block_d < 32 else rows  # more spill


def aot_cases(everything: bool = False) -> Iterator[AotCase]:
    """What the launcher compiles, with memory and 7 bits.

    everything: each dtype with every size of rows.
    """
    types = {
        **dict.fromkeys(("q_ptr", "k_ptr", "mk_ptr", "planes_ptr", "seed_ptr", "centre_ptr")),
        **dict.fromkeys(("random_ptr", "threshold_ptr", "middle_ptr"), "*fp32"),
        **dict.fromkeys(("q_code_ptr", "k_code_ptr"), "*u8"),
        "table_ptr": "*i64",
    }

    def case(name: str, kernel, dtype: str, constants: dict, warps: int) -> AotCase:
        signature = {}
        for argument in kernel.arg_names:
            if argument.endswith("_ptr"):
                signature[argument] = types.get(argument, "*i32") or f"*{dtype}"
            elif argument == "random_strides":
                signature[argument] = ("i32", "i32", 1)
            elif argument.endswith("_strides"):
                signature[argument] = ("i64", "i64", "i32", 1)
            elif argument not in constants:
                signature[argument] = "i32"
        return AotCase(name, kernel, signature, constants, warps, 3, maxnreg=MAX_REGISTERS)

    both = ("aligned", "unaligned")
    some = ("bf16", (64, 256), both), ("fp32", (64, 256), both), ("fp16", (64,), both[:1])
    each = [(dtype, (16, 32, 64, 128, 256), both) for dtype in ("bf16", "fp16", "fp32")]
    for dtype, head_dims, variants in each if everything else some:
        for head_dim in head_dims:
            of = torch.float32 if dtype == "fp32" else torch.bfloat16
            kept = {"variants": variants}
            gathers = {"has_dots": dtype != "fp32", "pipelined": True, **kept}
            name = f"{dtype}-d{head_dim}"
            common = {"HAS_MEMORY": True, "HEAD_DIM": head_dim, "BLOCK_D": head_dim}
            samples = {"SAMPLED": SAMPLED_TOKENS, **common, "ROWS": 2048 // head_dim}
            planes = case(f"planes-{name}", _hyper_planes_kernel, dtype, samples, 8)
            yield replace(planes, **kept)
            samples, warps = {"BUCKETS": 128, **samples}, hash_warps(head_dim)
            seeds = case(f"seeds-{name}", _hyper_seeds_kernel, dtype, samples, warps)
            yield replace(seeds, **kept)
            samples = samples | {"ROWS": cluster_rows(of, head_dim)}
            centres = case(f"centres-{name}", _hyper_centres_kernel, dtype, samples, 8)
            yield replace(centres, **gathers)
            for kind, rows, warps in (
                ("hash", rows_at_a_time(of, head_dim), hash_warps(head_dim)),
                ("nearest", cluster_rows(of, head_dim), 8),
            ):
                sizes = {"BUCKETS": 128, "CLUSTERED": kind == "nearest", "ROWS": rows}
                found = case(f"{kind}-{name}", _hyper_hash_kernel, dtype, sizes | common, warps)
                yield replace(found, **gathers)
    yield case("scan", _hyper_scan_kernel, "", {"BUCKETS": 128, "ROWS": 32}, 4)
    yield case(
        "order", _hyper_order_kernel, "", {"BUCKETS": 128, "BLOCK": QUERY_BLOCK, "PART": 32}, 8
    )
