"""CPU form of `hyper_attention`, in O(L): PyTorch's blockwise attention on gathered windows.

A level's queries are taken in the plan's order, 128 at a time. Such a block attends to one small
set of keys, its window followed by the residual keys, with the log weights of the residual as an
additive mask; a row of these blocks is one call. Levels, and the exact parts, are merged by lse as
in `xl_attention`, whose form also computes the exact parts. The backward gives each part the merged
out and lse, which makes it exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..xl_attention import eager as exact
from .plan import QUERY_BLOCK, Choices, Level, Spec, gather, is_in_parts, levels, strata

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Query blocks of a call: their keys take 8 MiB of fp32 at head dim 128 and 512 keys. With two free
# cores 8 to 32 take the same time within 10 %; where cores are shared, fewer calls wait less.
BLOCKS = 32


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    choices: Choices,
    spec: Spec,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[B, H, L, D]` in the layout of query, lse `[B, H, L]`)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query)
    lse = torch.full(query.shape[:3], float("-inf"), dtype=wide, device="cpu")
    query, scale, _ = exact.positive(query, scale)
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    all_levels = levels(spec, query.shape[2], key.shape[2], num_memory)
    # One estimated level writes its result in place; all else is merged.
    is_whole = not is_in_parts(all_levels) and not all_levels[0].is_exact
    for b, g, heads in _groups(query, key):
        q, k, v, mk, mv = _slices(query, key, value, memory_key, memory_value, b, g, heads)
        total = q if is_whole else torch.zeros(q.shape, dtype=wide, device="cpu")
        base = lse[b : b + 1, heads]
        for level, segment in _parts(spec, query, key, memory_key):
            rows = level.queries(segment)
            if level.is_exact:
                keys = _columns(level.keys(segment), k, v, mk, mv)
                found = exact.forward(q[:, :, rows], *keys, scale, level.is_causal)
                exact.merge(total[:, :, rows], base[:, :, rows], *found)
                continue
            for h in range(q.shape[1]):
                part = _Part(level, segment, spec, choices, b, heads.start + h, g)
                for places, mine, mine_lse in part.attend(q[0, h], k, v, mk, mv, scale):
                    if is_whole:
                        out[b, heads.start + h].index_copy_(0, places, mine)
                        base[0, h].index_copy_(0, places, mine_lse)
                        continue
                    old, old_lse = total[0, h, places], base[0, h, places]
                    exact.merge(old, old_lse, mine, mine_lse)
                    total[0, h].index_copy_(0, places, old)
                    base[0, h].index_copy_(0, places, old_lse)
        if not is_whole:
            out[b : b + 1, heads] = total
    return out, lse


def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    choices: Choices,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    spec: Spec,
    scale: float,
    needs_memory: bool,
) -> list[torch.Tensor]:
    """Gradients of query, key and value; of memory_key and memory_value too if needs_memory."""
    inputs = [query, key, value]
    if needs_memory:
        assert memory_key is not None and memory_value is not None
        inputs += [memory_key, memory_value]
    grads = [torch.empty_like(t) for t in inputs]
    wide = torch.promote_types(query.dtype, torch.float32)
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    head_dim = query.shape[3]
    query, scale, sign = exact.positive(query, scale)
    lse_columns = 0 if grad_lse is None else exact.EXTRA
    for b, g, heads in _groups(query, key):
        q, k, v, mk, mv = _slices(query, key, value, memory_key, memory_value, b, g, heads)
        o, do, base = (t[b : b + 1, heads] for t in (out, grad_out, lse))
        dlse = None if grad_lse is None else grad_lse[b : b + 1, heads]
        q_flash, o_flash, do_flash = q, o, do
        if dlse is not None:
            q_flash, o_flash, do_flash = exact.with_lse_gradient(q, o, do, dlse)
        # Sums over levels, windows and the heads of a group are rounded once.
        dq = torch.zeros(q.shape, dtype=wide, device="cpu")
        dk, dv = (
            torch.zeros((num_memory + k.shape[2], head_dim), dtype=wide, device="cpu")
            for _ in range(2)
        )
        for level, segment in _parts(spec, query, key, memory_key):
            rows, columns = level.queries(segment), level.keys(segment)
            if level.is_exact:
                keys = _columns(columns, k, v, mk, mv)
                found = exact.backward(
                    q[:, :, rows], *keys, o[:, :, rows], base[:, :, rows], do[:, :, rows],
                    None if dlse is None else dlse[:, :, rows], scale, level.is_causal,
                    keys[2] is not None,
                )  # fmt: skip
                dq[:, :, rows] += found[0]
                for total, parts in ((dk, found[1::2]), (dv, found[2::2])):
                    # Memory comes after the current keys in the list, and before them in the sum.
                    total[columns] += torch.cat([p[0, 0] for p in reversed(parts)])
                continue
            for h in range(q.shape[1]):
                part = _Part(level, segment, spec, choices, b, heads.start + h, g, lse_columns)
                of_queries = q_flash[0, h], o_flash[0, h], do_flash[0, h], base[0, h, :, None]
                for places, mine in part.differentiate(of_queries, k, v, mk, mv, dk, dv, scale):
                    dq[0, h].index_add_(0, places, mine)
        grads[0][b, heads] = dq[0] * sign
        grads[1][b, g], grads[2][b, g] = dk[num_memory:], dv[num_memory:]
        if needs_memory:
            grads[3][b, g], grads[4][b, g] = dk[:num_memory], dv[:num_memory]
    return grads


def _groups(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[int, int, slice]]:
    """(batch item, key head, its query heads)."""
    group = query.shape[1] // max(1, key.shape[1])
    for b in range(query.shape[0]):
        for g in range(key.shape[1]):
            yield b, g, slice(g * group, (g + 1) * group)


def _slices(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    b: int,
    g: int,
    heads: slice,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Query `[1, group, L, D]`, and the rest `[1, 1, ., D]`, of one key head."""
    k, v = key[b : b + 1, g : g + 1], value[b : b + 1, g : g + 1]
    if memory_key is None or memory_value is None:
        return query[b : b + 1, heads], k, v, None, None
    memory = memory_key[b : b + 1, g : g + 1], memory_value[b : b + 1, g : g + 1]
    return query[b : b + 1, heads], k, v, *memory


def _parts(
    spec: Spec, query: torch.Tensor, key: torch.Tensor, memory_key: torch.Tensor | None
) -> Iterator[tuple[Level, int]]:
    """(level, segment) of every part of the attention."""
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    for level in levels(spec, query.shape[2], key.shape[2], num_memory):
        for segment in range(level.segments):
            yield level, segment


def _columns(
    columns: slice,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The keys and values of an exact part: current ones, and those in memory if there are any."""
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    current = slice(max(columns.start - num_memory, 0), max(columns.stop - num_memory, 0))
    k, v = key[:, :, current], value[:, :, current]
    if columns.start >= num_memory:
        return k, v, None, None
    assert memory_key is not None and memory_value is not None
    return k, v, memory_key[:, :, columns], memory_value[:, :, columns]


class _Part:
    """A segment of an approximate level for one query head: its gathers, and their adjoints."""

    def __init__(
        self,
        level: Level,
        segment: int,
        spec: Spec,
        choices: Choices,
        b: int,
        h: int,
        g: int,
        lse_columns: int = 0,
    ) -> None:
        self.level, self.lse_columns = level, lse_columns
        rows, columns = level.queries(segment), level.keys(segment)
        if not spec.is_ordered:
            self.query_order = torch.arange(rows.start, rows.stop, device="cpu")
            self.key_order = torch.arange(columns.start, columns.stop, device="cpu")
        else:
            q_place, k_place = level.order(segment)
            self.query_order = choices.query_order[b, h, q_place].long()
            self.key_order = choices.key_order[b, g, k_place].long()
        self.start = choices.window_start[b, h, level.blocks(segment)].long()
        self.places = choices.residual_place[level.residuals(segment)].long()
        self.is_mean = spec.residual == "mean"
        self.bounds = strata(level.num_keys, max(level.num_residual, 1))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        memory_key: torch.Tensor | None,
        memory_value: torch.Tensor | None,
        scale: float,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(places `[n]` of some queries, their out `[n, D]`, their lse `[n]`), call after call."""
        wide = torch.promote_types(query.dtype, torch.float32)
        keys, values = self.keys(key, memory_key), self.keys(value, memory_value)
        buffers = self.buffer(keys), self.buffer(values)
        for blocks, places in self.calls():
            q = self.rows(query, places)
            k = self.windows(keys, blocks, buffers[0])
            v = self.windows(values, blocks, buffers[1])
            mask = self.mask(blocks, wide)
            found = _flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
            out, lse = (t.flatten(0, 2)[: places.shape[0]] for t in found)
            yield places, out, lse

    def differentiate(
        self,
        of_queries: tuple[torch.Tensor, ...],
        key: torch.Tensor,
        value: torch.Tensor,
        memory_key: torch.Tensor | None,
        memory_value: torch.Tensor | None,
        grad_key: torch.Tensor,
        grad_value: torch.Tensor,
        scale: float,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(places `[n]` of some queries, their gradient `[n, D]`); adds those of keys and values.

        of_queries are query, out and its gradient `[L, D]`, and lse `[L, 1]`; out and lse are those
        of all parts. grad_key, grad_value are `[M + Lk, D]`.
        """
        dtype, head_dim = grad_key.dtype, grad_key.shape[1]
        keys, values = self.keys(key, memory_key), self.keys(value, memory_value)
        buffers = self.buffer(keys), self.buffer(values)
        dk_rows, dv_rows = self.zeros(dtype, head_dim), self.zeros(dtype, head_dim)
        for blocks, places in self.calls():
            q, o, do, lse = (self.rows(t, places) for t in of_queries)
            k = self.windows(keys, blocks, buffers[0])
            v = self.windows(values, blocks, buffers[1])
            mask = self.mask(blocks, dtype)
            dq, dk, dv = _flash_backward(
                do, q, k, v, o, lse[..., 0], 0.0, False, attn_mask=mask, scale=scale
            )
            self.collect(dk_rows, dk[..., :head_dim], blocks)
            self.collect(dv_rows, dv[..., :head_dim], blocks)
            yield places, dq.flatten(0, 2)[: places.shape[0], :head_dim].to(dtype)
        self.scatter(grad_key, dk_rows)
        self.scatter(grad_value, dv_rows)

    def calls(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(query blocks of a call, places of their queries), without blocks past the last query."""
        used = -(-self.query_order.shape[0] // QUERY_BLOCK)
        for first in range(0, used, BLOCKS):
            blocks = slice(first, min(first + BLOCKS, used))
            yield blocks, self.query_order[first * QUERY_BLOCK : blocks.stop * QUERY_BLOCK]

    def rows(self, tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Rows of the queries at places `[blocks, 1, 128, D]`, zeros after the last."""
        blocks = -(-places.shape[0] // QUERY_BLOCK)
        rows = tensor.new_zeros((blocks * QUERY_BLOCK, tensor.shape[1]))
        torch.index_select(tensor, 0, places, out=rows[: places.shape[0]])
        return rows.view(blocks, 1, QUERY_BLOCK, tensor.shape[1])

    def keys(self, current: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        """Ordered rows `[n + m, D]` of the segment's keys, or values, and the residual's."""
        n, m = self.level.num_keys, self.level.num_residual
        rows = current.new_empty((n + m, current.shape[3]))
        gather(None if memory is None else memory[0, 0], current[0, 0], self.key_order, rows[:n])
        if self.is_mean:
            wide = torch.promote_types(rows.dtype, torch.float32)
            rows[n:] = self._sums(rows[:n].to(wide)) / self.bounds.diff()[:, None]
        elif m:
            torch.index_select(rows[:n], 0, self.places, out=rows[n:])
        return torch.nn.functional.pad(rows, (0, self.lse_columns)) if self.lse_columns else rows

    def _sums(self, rows: torch.Tensor) -> torch.Tensor:
        """Sums `[m, D]` of the rows of each stratum."""
        count = self.level.num_residual
        return torch.segment_reduce(rows, "sum", lengths=self.bounds.diff(), axis=0)[:count]

    def buffer(self, rows: torch.Tensor) -> torch.Tensor:
        """Room for what `windows` gives, call after call: fresh memory would cost page faults."""
        per_block = self.level.width + self.level.num_residual
        return rows.new_empty((BLOCKS * per_block, rows.shape[1]))

    def windows(self, rows: torch.Tensor, blocks: slice, buffer: torch.Tensor) -> torch.Tensor:
        """The keys or values of each block `[blocks, 1, width + m, D]`, in the buffer."""
        index = self._index(blocks).flatten()
        found = torch.index_select(rows, 0, index, out=buffer[: index.shape[0]])
        return found.view(blocks.stop - blocks.start, 1, -1, rows.shape[1])

    def _index(self, blocks: slice) -> torch.Tensor:
        """What of `keys` a block attends to `[blocks, width + m]`."""
        start = self.start[blocks, None]
        window = start + torch.arange(self.level.width, device="cpu")
        residual = self.level.num_keys + torch.arange(self.level.num_residual, device="cpu")
        return torch.cat([window, residual.expand(start.shape[0], -1)], 1)

    def mask(self, blocks: slice, dtype: torch.dtype) -> torch.Tensor | None:
        """Log weights `[blocks, 1, 1, width + m]`: 0 in the window."""
        level = self.level
        if not level.num_residual:
            return None
        start = self.start[blocks, None]
        if self.is_mean:
            begin, end = self.bounds[:-1], self.bounds[1:]
            inside = torch.minimum(end, start + level.width) - torch.maximum(begin, start)
            weights = (end - begin - inside.clamp(min=0)).to(dtype)
        else:
            outside = (self.places < start) | (self.places >= start + level.width)
            count = outside.sum(1, keepdim=True).clamp(min=1)
            weights = outside.to(dtype) * (level.num_keys - level.width) / count
        return torch.nn.functional.pad(weights.log(), (level.width, 0))[:, None, None]

    def zeros(self, dtype: torch.dtype, head_dim: int) -> torch.Tensor:
        """The gradient of `keys`, to begin with."""
        count = self.level.num_keys + self.level.num_residual
        return torch.zeros((count, head_dim), dtype=dtype, device="cpu")

    def collect(self, total: torch.Tensor, grad: torch.Tensor, blocks: slice) -> None:
        """The adjoint of `windows`: adds `grad` to the gradient of `keys`."""
        width, n = self.level.width, self.level.num_keys
        total[n:] += grad[:, 0, width:].sum(0, dtype=total.dtype)
        index = self._index(blocks)[:, :width].flatten()
        window = grad[:, 0, :width].flatten(0, 1).to(total.dtype)
        total.index_add_(0, index, window)

    def scatter(self, total: torch.Tensor, grad: torch.Tensor) -> None:
        """The adjoint of `keys`: adds the gradient of ordered rows to that of all keys."""
        n = self.level.num_keys
        rows, residual = grad[:n], grad[n:]
        if self.is_mean:
            sizes = self.bounds.diff()
            rows = rows + (residual / sizes[:, None]).repeat_interleave(sizes, 0)
        else:
            rows.index_add_(0, self.places, residual)
        total.index_add_(0, self.key_order, rows)
