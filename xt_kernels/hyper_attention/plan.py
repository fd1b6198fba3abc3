"""What `hyper_attention` decides before it attends: which keys a query meets, and with what weight.

Non-causal attention is one *level*: all queries against all keys. Causal attention follows the
recursion of the paper (Han et al. 2023, arXiv 2310.05869, algorithm 4), unrolled: exact triangles
of `leaf` tokens on the diagonal, and per power of two one level in which every second segment of
queries meets the segment of keys before it. Memory, and keys before the first query, are a level of
their own. A level with no more keys than the budget (window + residual) is exact.

In every other level a *plan* holds an order of queries and one of keys, a window of keys for each
block of 128 ordered queries, and the places of the residual keys. Buckets make the orders. With the
window "lsh" the signs of a token's projections are its bucket, and buckets are sorted along a Gray
code, so that neighbours differ in one sign. Two things differ from the paper. Tokens are centred
before they are hashed, and the hyperplanes are C P, random ones P times the covariance C of up to
1024 of the keys: they cut where keys vary. And a window is centred where the block's middle query
falls in its bucket among the *keys of that bucket*, not at its rank among all keys: equal buckets
meet. With the window "cluster" a token's bucket is the nearest of 2**bits centres: some of the
keys, sorted along a Gray code of their projections, then moved by one step of Lloyd's algorithm on
up to 1024 keys (as routing by k-means, Roy et al. 2021, arXiv 2003.05997, with no state to train).

Window starts never fall along a segment, so the query blocks that see a key are a range.
Everything is deterministic: random choices come from `seed`, and are the same for all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _checks as checks
from .._kept import kept

if TYPE_CHECKING:
    from .describe import Description

# Ordered queries that share a window. The tiles of the kernels divide it.
QUERY_BLOCK = 128
# Tokens that are hashed and counted together; segments of the causal levels are multiples of it.
TILE = 256
# Tokens that stand for all where centres and covariance are taken.
SAMPLED_TOKENS = 1024
# 2**31 over the golden ratio; see `sampled`.
GOLDEN = 1327217885
MAX_PROJECTIONS = 8
# Samples of a segment, whose places a program holds at once.
MAX_SAMPLES = 2**16
MAX_SEED = 2**63 - 1


class Spec(NamedTuple):
    """The choices of `hyper_attention` that shape a plan; see there."""

    is_causal: bool
    block_size: int
    sample_size: int
    min_seq_len: int
    window: str
    residual: str

    @property
    def is_ordered(self) -> bool:
        """Whether tokens are sorted by bucket."""
        return self.window != "tile"

    @property
    def budget(self) -> int:
        """Keys per query and level."""
        return self.block_size + (0 if self.residual == "none" else self.sample_size)

    def is_exact(self, num_keys: int, num_memory: int) -> bool:
        """Whether attention over so many keys is exact from the start."""
        return num_keys + num_memory <= max(self.min_seq_len, self.budget)


@dataclass(frozen=True)
class Level:
    """Segments of queries, each against its own segment of keys.

    Segment s holds the queries `q_begin + s step + [0, num_queries)` below `q_end` and the keys
    `k_begin + s step + [0, num_keys)` below `k_end`, which count through memory and then `key`.
    The offsets say where the level begins in the plan's tensors: its queries, its keys, its blocks
    of queries, its residual keys; first_segment, where among the segments of all hyper levels.
    """

    segments: int
    step: int
    q_begin: int
    num_queries: int
    q_end: int
    k_begin: int
    num_keys: int
    k_end: int
    is_causal: bool = False
    width: int = 0
    num_residual: int = 0
    first_aligned: int = 0
    q_offset: int = 0
    k_offset: int = 0
    block_offset: int = 0
    residual_offset: int = 0
    first_segment: int = 0

    @property
    def is_exact(self) -> bool:
        """Every query of a segment meets every key of it (up to its own place, if causal)."""
        return self.width == self.num_keys

    @property
    def num_blocks(self) -> int:
        """Query blocks of a segment."""
        return -(-self.num_queries // QUERY_BLOCK)

    def queries(self, segment: int) -> slice:
        """Where the segment's queries lie."""
        begin = self.q_begin + segment * self.step
        return slice(begin, min(begin + self.num_queries, self.q_end))

    def keys(self, segment: int) -> slice:
        """Where the segment's keys lie, counted through memory and `key`."""
        begin = self.k_begin + segment * self.step
        return slice(begin, min(begin + self.num_keys, self.k_end))

    def count_pairs(self, keys: int) -> int:
        """Pairs that meet, if each query meets `keys` of its segment, or those before it."""
        rows = [self.queries(s) for s in range(self.segments)]
        counts = [r.stop - r.start for r in rows]
        return sum(n * (n + 1) // 2 if self.is_causal else n * keys for n in counts)

    def order(self, segment: int) -> tuple[slice, slice]:
        """Where the segment lies in the plan's order of queries and of keys."""
        q = self.q_offset + segment * self.num_queries
        k = self.k_offset + segment * self.num_keys
        rows = self.queries(segment)
        return slice(q, q + rows.stop - rows.start), slice(k, k + self.num_keys)

    def blocks(self, segment: int) -> slice:
        """Where the segment's windows lie in the plan."""
        begin = self.block_offset + segment * self.num_blocks
        return slice(begin, begin + self.num_blocks)

    def residuals(self, segment: int) -> slice:
        """Where the segment's residual keys lie in the plan."""
        begin = self.residual_offset + segment * self.num_residual
        return slice(begin, begin + self.num_residual)


@lru_cache(maxsize=256)
def levels(spec: Spec, num_queries: int, num_keys: int, num_memory: int) -> tuple[Level, ...]:
    """The levels of attention that `spec` does not make exact from the start."""
    total = num_memory + num_keys
    if not spec.is_causal:
        found = [Level(1, 0, 0, num_queries, num_queries, 0, total, total)]
        return _placed(found, spec, num_memory)
    square = min(num_queries, num_keys)
    found = []
    if total > square:
        before = total - square
        found.append(Level(1, 0, 0, num_queries, num_queries, 0, before, before))
    # Halved until it is short enough; a segment is a number of tiles.
    leaf = max(square, 1)
    while leaf > max(spec.min_seq_len, TILE):
        leaf = -(-leaf // 2)
    leaf = -(-leaf // TILE) * TILE
    q_begin, k_begin = num_queries - square, total - square
    count = -(-square // leaf)
    if count:
        ends = num_queries, k_begin, leaf, total
        found.append(Level(count, leaf, q_begin, leaf, *ends, is_causal=True))
    size = leaf
    while size < square:
        pairs = -(-square // size) // 2
        ends = num_queries, k_begin, size, total
        found.append(Level(pairs, 2 * size, q_begin + size, size, *ends))
        size *= 2
    return _placed(found, spec, 0)


def hyper_levels(spec: Spec, num_queries: int, num_keys: int, num_memory: int) -> list[Level]:
    """The levels that are estimated."""
    return [v for v in levels(spec, num_queries, num_keys, num_memory) if not v.is_exact]


def is_in_parts(found: tuple[Level, ...]) -> bool:
    """Whether results are sums over levels: not if one level has all queries."""
    return len(found) != 1 or found[0].q_begin > 0


def _placed(found: list[Level], spec: Spec, num_memory: int) -> tuple[Level, ...]:
    """The levels with their windows, and with their places in the plan's tensors."""
    placed = []
    offsets = [0, 0, 0, 0, 0]
    for level in found:
        if level.is_causal or level.num_keys <= spec.budget:
            placed.append(replace(level, width=level.num_keys))
            continue
        q, k, block, residual, segment = offsets
        level = replace(
            level,
            width=spec.block_size,
            num_residual=0 if spec.residual == "none" else spec.sample_size,
            first_aligned=num_memory,
            q_offset=q,
            k_offset=k,
            block_offset=block,
            residual_offset=residual,
            first_segment=segment,
        )
        placed.append(level)
        per_segment = (level.num_queries, level.num_keys, level.num_blocks, level.num_residual, 1)
        offsets = [o + level.segments * n for o, n in zip(offsets, per_segment, strict=True)]
    return tuple(placed)


class Choices(NamedTuple):
    """The tensors of a plan, int32, all hyper levels one after the other.

    query_order: `[B, H, .]` queries by bucket; key_order: `[B, groups, .]` keys by bucket, counted
        through memory and `key`. Both empty for the window "tile", whose order is that of memory.
    window_start: `[B, H, .]`, one for each block of 128 ordered queries: the place of its first key
        among the ordered keys of the segment.
    residual_place: `[.]` ordered places of the sampled keys in the segment, ascending; and
    residual_key: `[B, groups, .]` which keys these are. Both empty for "mean" and "none".
    """

    query_order: torch.Tensor
    key_order: torch.Tensor
    window_start: torch.Tensor
    residual_place: torch.Tensor
    residual_key: torch.Tensor


def strata(num_keys: int, count: int) -> torch.Tensor:
    """Bounds `[count + 1]` of the strata of ordered keys: the first ones have a key more."""
    j = torch.arange(count + 1, device="cpu")
    return j * (num_keys // count) + j.clamp(max=num_keys % count)


@kept(64)
def random_projections(head_dim: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """Standard normal hyperplanes `[1, D, count]`, fp32, the same on every device.

    Kept, so that a second call copies nothing to the device; do not write into it.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, head_dim, count)
    # Whatever the default device and dtype are.
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(device)


class Drawn(NamedTuple):
    """Places `[.]` of sampled keys, int32: in their segment's order, in the plan's `key_order`, and
    counted through memory and `key` where that is the order. All empty for "mean" and "none"."""

    in_segment: torch.Tensor
    in_order: torch.Tensor
    in_memory: torch.Tensor


@kept(64)
def drawn_places(
    spec: Spec, num_queries: int, num_keys: int, num_memory: int, seed: int, device: torch.device
) -> Drawn:
    """Samples for these sizes: one a stratum, or uniform with replacement.

    Kept, so that a second call copies nothing to the device; do not write into them.
    """
    # Another stream of numbers than that of the projections.
    generator = torch.Generator("cpu").manual_seed(seed ^ 0x5EED)
    found: tuple[list[torch.Tensor], ...] = ([], [], [])
    for level in hyper_levels(spec, num_queries, num_keys, num_memory):
        if spec.residual not in ("sample", "uniform"):
            continue
        shape = (level.segments, level.num_residual)
        if spec.residual == "uniform":
            drawn = torch.randint(level.num_keys, shape, generator=generator, device="cpu")
            drawn = drawn.sort(-1).values
        else:
            bounds = strata(level.num_keys, level.num_residual)
            # fp64: the product stays below the stratum's size.
            inside = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
            drawn = bounds[:-1] + (inside * bounds.diff()).long()
        segment = torch.arange(level.segments, device="cpu")[:, None]
        found[0].append(drawn.flatten())
        found[1].append((drawn + level.k_offset + segment * level.num_keys).flatten())
        found[2].append((drawn + level.k_begin + segment * level.step).flatten())
    none = torch.empty(0, dtype=torch.long, device="cpu")
    # One copy to the device for all three.
    drawn = torch.stack([torch.cat([none, *places]) for places in found])
    return Drawn(*drawn.to(device=device, dtype=torch.int32))


@kept(64)
def aligned_starts(
    spec: Spec, num_queries: int, num_keys: int, num_memory: int, device: torch.device
) -> torch.Tensor:
    """Windows `[.]` around the same relative place: the order of memory is meaningful. Kept."""
    starts = [torch.empty(0, dtype=torch.long, device="cpu")]
    for level in hyper_levels(spec, num_queries, num_keys, num_memory):
        middle = torch.arange(level.num_blocks, device="cpu") * QUERY_BLOCK + QUERY_BLOCK // 2
        keys, queries = level.num_keys - level.first_aligned, level.num_queries
        centre = level.first_aligned + middle.clamp(max=queries) * keys // queries
        start = (centre - level.width // 2).clamp(0, level.num_keys - level.width)
        starts.append(start.repeat(level.segments))
    return torch.cat(starts).to(device=device, dtype=torch.int32)


def sampled(count: int, length: int) -> torch.Tensor:
    """Places of `count` tokens that stand for a sequence.

    Multiples of the golden ratio: the first of them are spread as evenly as all, and a sequence
    that repeats itself, as the rows of an image do, is met in all phases.
    """
    return (torch.arange(count, device="cpu") * GOLDEN % 2**31) * length >> 31


def gather(
    memory: torch.Tensor | None, current: torch.Tensor, index: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Copies rows `index` `[n]` of `[memory, current]` (both `[L, D]`) to `out` `[n, D]`."""
    if memory is None or not memory.shape[0]:
        return torch.index_select(current, 0, index, out=out)
    old = index < memory.shape[0]
    out[old] = memory.index_select(0, index[old])
    out[~old] = current.index_select(0, index[~old] - memory.shape[0])
    return out


def gray_rank(signs: torch.Tensor) -> torch.Tensor:
    """Rank `[...]` of signs `[..., bits]` along the Gray code: equal to i where signs are i's code.

    The code of i is i ^ (i >> 1), so that the codes of i and i + 1 differ in one bit.
    """
    code = signs.long() @ (1 << torch.arange(signs.shape[-1], device="cpu"))
    for shift in (1, 2, 4):
        code ^= code >> shift
    return code


def buckets(
    spec: Spec,
    query: torch.Tensor,
    key: torch.Tensor,
    memory_key: torch.Tensor | None,
    random: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buckets of queries `[L]` and of keys `[M + Lk]` of one head, from 0 on.

    query, key, memory_key: `[L, D]`. random: hyperplanes `[D, bits]`, fp32.
    """
    find, hash_of = (centres, nearest) if spec.window == "cluster" else (hyperplanes, hash_codes)
    rows = sampled_keys(key, memory_key, SAMPLED_TOKENS)
    places = sampled(min(query.shape[0], SAMPLED_TOKENS), query.shape[0])
    middles = query[places].float().mean(0), rows.mean(0)
    found = find(rows - middles[1], random, key.dtype)
    keys = hash_of(key, found, middles[1])
    if memory_key is not None:
        keys = torch.cat([hash_of(memory_key, found, middles[1]), keys])
    return hash_of(query, found, middles[0]), keys


def sampled_keys(key: torch.Tensor, memory_key: torch.Tensor | None, count: int) -> torch.Tensor:
    """Up to `count` keys `[n, D]`, fp32."""
    length = key.shape[0] + (0 if memory_key is None else memory_key.shape[0])
    places = sampled(min(count, length), length)
    return gather(memory_key, key, places, key.new_empty(len(places), key.shape[1])).float()


def hyperplanes(rows: torch.Tensor, random: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Planes `[D, bits]` of unit length, across what varies in centred rows `[n, D]`."""
    planes = rows.mT @ (rows @ random)
    # A constant sequence has no covariance; any plane does.
    length = planes.norm(dim=0)
    planes = torch.where(length > 0, planes / length, random / random.norm(dim=0))
    return planes.to(dtype)


def hash_codes(tokens: torch.Tensor, planes: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """Buckets `[L]` of tokens `[L, D]`: which side of each plane through the middle, in fp32."""
    planes = planes.float()
    return gray_rank(tokens.float() @ planes > middle @ planes)


def centres(rows: torch.Tensor, random: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Centres `[2**bits, D]` of clusters of centred rows `[n, D]`."""
    count = 2 ** random.shape[1]
    # Fewer than `count` rows begin again.
    seeds = rows[torch.arange(count, device="cpu") % len(rows)].to(dtype).float()
    seeds = seeds[gray_rank(seeds @ random > 0).argsort(stable=True)]
    own = nearest(rows, seeds, torch.zeros_like(seeds[0]))
    members = torch.bincount(own, minlength=count)[:, None]
    sums = torch.zeros_like(seeds).index_add_(0, own, rows)
    return torch.where(members > 0, sums / members.clamp(min=1), seeds).to(dtype)


def nearest(tokens: torch.Tensor, centres: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """Buckets `[L]` of tokens `[L, D]`: the centre nearest to token - middle, in fp32."""
    centres = centres.float()
    # |t - m - c|**2 without what all centres share.
    limit = (centres * (middle + centres / 2)).sum(1)
    # A part's scores stay in a cache.
    parts = (part.float() @ centres.mT - limit for part in torch.split(tokens, 4096))
    return torch.cat([scores.argmax(1) for scores in parts])


def eager_choices(
    spec: Spec,
    query: torch.Tensor,
    key: torch.Tensor,
    memory_key: torch.Tensor | None,
    projections: torch.Tensor,
    seed: int,
) -> Choices:
    """A plan's tensors for query `[B, H, L, D]` and key `[B, groups, Lk, D]` on a CPU.

    projections: `[groups, D, bits]`, fp32.
    """
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    choices = empty_choices(spec, query, key, num_memory, seed)
    if not spec.is_ordered:
        return choices
    sizes = query.shape[2], key.shape[2], num_memory
    hyper = hyper_levels(spec, *sizes)
    group = query.shape[1] // max(1, key.shape[1])
    for b, h in product(range(query.shape[0]), range(query.shape[1])):
        g = h // group
        memory = None if memory_key is None else memory_key[b, g]
        q_codes, k_codes = buckets(spec, query[b, h], key[b, g], memory, projections[g])
        for level in hyper:
            for s in range(level.segments):
                rows, columns = level.queries(s), level.keys(s)
                q_place, k_place = level.order(s)
                q, k = q_codes[rows], k_codes[columns]
                choices.query_order[b, h, q_place] = q.argsort(stable=True).int() + rows.start
                choices.key_order[b, g, k_place] = k.argsort(stable=True).int() + columns.start
                starts = _bucket_starts(level, q, k, 2 ** projections.shape[2])
                choices.window_start[b, h, level.blocks(s)] = starts.int()
    return with_residual_keys(choices, drawn_places(spec, *sizes, seed, key.device).in_order)


def empty_choices(
    spec: Spec, query: torch.Tensor, key: torch.Tensor, num_memory: int, seed: int
) -> Choices:
    """A plan's tensors before any hashing: complete for the window "tile", else to be filled."""
    (batch, heads, num_queries), (groups, num_keys) = query.shape[:3], key.shape[1:3]
    sizes = num_queries, num_keys, num_memory
    hyper = hyper_levels(spec, *sizes)
    drawn = drawn_places(spec, *sizes, seed, key.device)
    # What is returned must be nobody else's.
    places = drawn.in_segment.clone()
    none = [query.new_empty((batch, n, 0), dtype=torch.int32) for n in (heads, groups, groups)]
    if not spec.is_ordered:
        starts = aligned_starts(spec, *sizes, key.device).repeat(batch, heads, 1)
        return Choices(none[0], none[1], starts, places, drawn.in_memory.repeat(batch, groups, 1))
    queries, keys, blocks = (
        sum(level.segments * getattr(level, name) for level in hyper)
        for name in ("num_queries", "num_keys", "num_blocks")
    )
    shapes = (batch, heads, queries), (batch, groups, keys), (batch, heads, blocks)
    # The slots of queries that the last, shorter segment of a causal level lacks are never used.
    new = query.new_zeros if spec.is_causal else query.new_empty
    orders = [new(shape, dtype=torch.int32) for shape in shapes]
    return Choices(orders[0], orders[1], orders[2], places, none[2])


def with_residual_keys(choices: Choices, in_order: torch.Tensor) -> Choices:
    """The choices with the keys at places `in_order` of the finished order."""
    if not in_order.numel():
        return choices
    return choices._replace(residual_key=choices.key_order.index_select(2, in_order))


def _bucket_starts(
    level: Level, q_codes: torch.Tensor, k_codes: torch.Tensor, count: int
) -> torch.Tensor:
    """`[num_blocks]` windows of a segment around the keys of the middle query's bucket."""
    q_count, k_count = (torch.bincount(c, minlength=count) for c in (q_codes, k_codes))
    q_end, k_begin = q_count.cumsum(0), k_count.cumsum(0) - k_count
    middle = torch.arange(level.num_blocks, device="cpu") * QUERY_BLOCK + QUERY_BLOCK // 2
    middle = middle.clamp(max=q_codes.shape[0] - 1)
    bucket = torch.searchsorted(q_end, middle, right=True)
    rank = middle - (q_end - q_count)[bucket]
    centre = k_begin[bucket] + rank * k_count[bucket] // q_count[bucket]
    return (centre - level.width // 2).clamp(0, level.num_keys - level.width)


@dataclass(frozen=True, eq=False)
class Plan:
    """What `hyper_attention` decided for one query and key: reusable and inspectable.

    Made by `make_plan`; given as `plan=` it stands for all choices made there. Holds no gradient.

    spec: the choices it was made with. num_queries, num_keys, num_memory: the lengths it is for.
    choices: its tensors, None where attention is exact. lsh_num_projs, projections, seed: what
    hashed, for `describe`.
    """

    spec: Spec
    num_queries: int
    num_keys: int
    num_memory: int
    choices: Choices | None
    lsh_num_projs: int = 7
    projections: torch.Tensor | None = None
    seed: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether this is exact attention: few keys, or a budget that covers all."""
        return self.choices is None

    @property
    def levels(self) -> tuple[Level, ...]:
        """Where approximate and exact parts lie; empty for exact attention."""
        if self.is_exact:
            return ()
        return levels(self.spec, self.num_queries, self.num_keys, self.num_memory)

    def segments(self) -> Iterator[tuple[Level, int]]:
        """(level, segment) of every approximate part."""
        for level in self.levels:
            if not level.is_exact:
                for segment in range(level.segments):
                    yield level, segment

    def check(
        self, op: str, query: torch.Tensor, key: torch.Tensor, memory_key: torch.Tensor | None
    ) -> None:
        """Raises ValueError, in the name of `op`, unless made for tensors of these sizes."""
        num_memory = 0 if memory_key is None else memory_key.shape[2]
        lengths = self.num_queries, self.num_keys, self.num_memory
        if lengths != (query.shape[2], key.shape[2], num_memory):
            rule = f"be made for (L, Lk, M) = {(query.shape[2], key.shape[2], num_memory)}"
            checks.fail(op, "plan", rule, lengths)
        if self.choices is None:
            return
        starts, orders = self.choices.window_start, self.choices.key_order
        heads = (*starts.shape[:2], orders.shape[1])
        if heads != (*query.shape[:2], key.shape[1]):
            rule = f"be made for (B, heads, key heads) = {(*query.shape[:2], key.shape[1])}"
            checks.fail(op, "plan", rule, heads)

    def describe(self, query: torch.Tensor, key: torch.Tensor, **options: Any) -> Description:
        """How well the plan fits these tensors; see `hyper_attention.describe.describe`."""
        from .describe import describe

        return describe(self, query, key, **options)
