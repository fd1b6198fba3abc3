"""CPU form of `selective_scan`: all channels and states of a chunk of tokens at a time.

A token of few states would leave PyTorch's operations with little but overhead. There a chunk is
cut into blocks of tokens that are scanned side by side:

1. each block from a zero state, which gives its end e_g,
2. the blocks' true starts s_{g+1} = exp(A sum of d over block g) s_g + e_g,
3. each block from its true start.

With many states a token, a chunk is one block, and only the third step is left. Backward runs the
same way from the last token to the first, on states computed again from the chunk's start. Memory
is that of a chunk, a few tensors of about `_ELEMENTS` numbers, for as many rows of the batch as
fit. Tensors are `[blocks, tokens of a block, B, G, N, D / G]`: channels last, so that broadcasting
over states is cheap. exp(x) is exp2(x log2(e)), which PyTorch computes four times as fast on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

LOG2E = 1.4426950408889634

# 4 MiB of fp32. On one core of an AMD EPYC (family 26): 2**19 and 2**21 take 1.1 times as long at
# 8,192 tokens of 6,144 states, 2**18 1.3 times.
_ELEMENTS = 2**20

# States of all blocks together that one operation updates: where overhead and arithmetic are alike.
_SIDE_BY_SIDE = 2**12


def chunk_length(states: int) -> int:
    """Tokens of a chunk, for so many states a token: 16 to 512."""
    length = 512
    while length > 16 and length * states > _ELEMENTS:
        length //= 2
    return length


def _unflatten(tensor: torch.Tensor, axis: int, sizes: tuple[int, ...]) -> torch.Tensor:
    view: torch.Tensor = tensor.unflatten(axis, sizes)  # type: ignore[no-untyped-call]
    return view


@dataclass(frozen=True)
class _Inputs:
    """The arguments of the op with channels in groups, and what a chunk of them looks like."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    softplus: bool

    @property
    def groups(self) -> int:
        return self.B.shape[1]

    def parts(self, chunk: int) -> Iterator[tuple[slice, _Inputs]]:
        """Rows of the batch whose chunks fill `_ELEMENTS`, and their inputs."""
        batch, _, length = self.u.shape
        count = max(1, _ELEMENTS // (min(chunk, length) * self.A.numel()))
        for first in range(0, batch, count):
            rows = slice(first, min(first + count, batch))
            z = None if self.z is None else self.z[rows]
            u, delta, B, C = (t[rows] for t in (self.u, self.delta, self.B, self.C))
            yield rows, replace(self, u=u, delta=delta, B=B, C=C, z=z)

    @property
    def rate(self) -> torch.Tensor:
        """A as `[G, N, D / G]`, contiguous: products with it are five times as fast."""
        return self.by_group(self.A.T).contiguous()

    def by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[.., N, D]` or `[.., 1, D]` as `[.., G, N, D / G]`."""
        return _unflatten(tensor, -1, (self.groups, -1)).movedim(-2, -3)

    def channels(self, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Tokens of `[B, D, L]` as `[blocks, tokens, B, G, 1, D / G]`, zero behind the end."""
        sizes = tensor.shape[0], self.groups, 1, tensor.shape[1] // self.groups
        return _unflatten(self._blocks(tensor, begin, end), 2, sizes)

    def projection(self, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Tokens of `[B, G, N, L]` as `[blocks, tokens, B, G, N, 1]`, zero behind the end."""
        return _unflatten(self._blocks(tensor, begin, end), 2, (*tensor.shape[:3], 1))

    def layout(self, count: int) -> tuple[int, int]:
        """(blocks, tokens of a block) of a chunk of `count` tokens."""
        blocks = max(1, min(_SIDE_BY_SIDE // self.A.numel(), count // 16))
        return blocks, -(-count // blocks)

    def _blocks(self, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Tokens of `[.., L]` as `[blocks, tokens, ..]`, the axes before L made one."""
        # Rows first: PyTorch transposes a whole matrix several times faster than a part of one.
        part = tensor[..., begin:end].to(self.A.dtype).contiguous().flatten(0, -2)
        part = part.t().contiguous()
        blocks, tokens = self.layout(end - begin)
        missing = blocks * tokens - len(part)
        if missing:
            part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
        return _unflatten(part, 0, (blocks, tokens))

    def step(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(d, what softplus was applied to or None), both as `channels` gives them."""
        raw = self.channels(self.delta, begin, end)
        if self.delta_bias is not None:
            raw = raw + self.by_group(self.delta_bias[None])
        step = F.softplus(raw) if self.softplus else raw
        if step.shape[0] * step.shape[1] > end - begin:
            # Tokens that are not there leave the state as it is.
            step = step.clone()
            step.flatten(0, 1)[end - begin :] = 0
        return step, raw if self.softplus else None

    def tokens(self, tensor: torch.Tensor, count: int) -> torch.Tensor:
        """The first tokens of `[blocks, tokens, B, G, 1, D / G]` as `[B, D, count]`."""
        rows = tensor.flatten(2).flatten(0, 1)[:count].contiguous().t().contiguous()
        return _unflatten(rows, 0, (self.u.shape[0], -1))


def _scan(
    decay: torch.Tensor, scan: torch.Tensor, whole: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """h_t = a_t h_{t-1} + b_t over all tokens of a chunk, in place of b; returns the last h.

    decay: a; scan: b. whole: product of a over each block, `[blocks, ..]`. start: h before it.
    """
    starts = start[None]
    if len(scan) > 1:
        end = scan[:, 0].clone()
        for a, b in zip(decay.unbind(1)[1:], scan.unbind(1)[1:], strict=True):
            torch.addcmul(b, a, end, out=end)
        starts = torch.empty_like(end)
        for g in range(len(scan)):
            starts[g] = start
            start = torch.addcmul(end[g], whole[g], start)
    for a, b in zip(decay.unbind(1), scan.unbind(1), strict=True):
        starts = torch.addcmul(b, a, starts, out=b)
    return starts[-1]


def _scan_back(
    decay: torch.Tensor, scan: torch.Tensor, whole: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """g_t = c_t + a_{t+1} g_{t+1} over all tokens of a chunk, in place of c; returns a_1 g_1.

    last: what reaches the chunk's last state from behind. The others as in `_scan`.
    """
    lasts = last[None]
    # Pairs (a_{t+1}, c_t) from behind.
    pairs = list(zip(decay.unbind(1)[1:], scan.unbind(1)[:-1], strict=True))[::-1]
    if len(scan) > 1:
        end = scan[:, -1].clone()
        for a, c in pairs:
            torch.addcmul(c, a, end, out=end)
        end *= decay[:, 0]
        lasts = torch.empty_like(end)
        for g in reversed(range(len(scan))):
            lasts[g] = last
            last = torch.addcmul(end[g], whole[g], last)
    behind = scan[:, -1].add_(lasts)
    for a, c in pairs:
        behind = torch.addcmul(c, a, behind, out=c)
    return decay[0, 0] * behind[0]


class _Space:
    """Tensors `[blocks, tokens, B, G, N, D / G]` that every chunk fills again.

    New ones for each chunk would cost as much as the arithmetic: their pages are mapped afresh.
    """

    def __init__(self, count: int) -> None:
        self.tensors: list[torch.Tensor | None] = [None] * count

    def of(self, given: _Inputs, step: torch.Tensor) -> list[torch.Tensor]:
        shape = (*step.shape[:4], given.A.shape[1], step.shape[5])
        size = math.prod(shape)
        for k, kept in enumerate(self.tensors):
            if kept is None or kept.numel() < size:
                self.tensors[k] = step.new_empty(size)
        return [t[:size].view(shape) for t in self.tensors if t is not None]


def _fill(
    given: _Inputs, step: torch.Tensor, x: torch.Tensor, projection: torch.Tensor,
    decay: torch.Tensor, scan: torch.Tensor, start: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """a_t in `decay` and h_t in `scan`; returns (product of a over each block, last h)."""
    rate = given.rate
    # Folded into A, log2(e) would shift all tokens alike.
    torch.mul(step * LOG2E, rate, out=decay).exp2_()
    torch.mul(x, projection, out=scan)
    whole = torch.exp(step.sum(1) * rate)
    return whole, _scan(decay, scan, whole, start)


def _first(given: _Inputs, initial_state: torch.Tensor | None) -> torch.Tensor:
    """The state before the first token, `[B, G, N, D / G]`."""
    if initial_state is not None:
        return given.by_group(initial_state.mT)
    batch, dim, _ = given.u.shape
    return given.by_group(given.A.new_zeros(batch, given.A.shape[1], dim))


def _by_channel(state: torch.Tensor) -> torch.Tensor:
    """`[.., G, N, D / G]` as `[.., N, D]`."""
    return state.movedim(-3, -2).flatten(-2)


def forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out `[B, D, L]`, last state `[B, D, N]`, states `[B, chunks, N, D]`)."""
    whole = _Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    batch, dim, length = u.shape
    out = torch.empty_like(u)
    last = A.new_empty(batch, dim, A.shape[1])
    chunks = -(-length // chunk) if keep_states else 0
    states = A.new_empty(batch, chunks, A.shape[1], dim)
    if not u.numel():
        last.zero_() if initial_state is None else last.copy_(initial_state)
        return out, last, states
    space = _Space(2)
    for rows, given in whole.parts(chunk):
        state = _first(given, None if initial_state is None else initial_state[rows])
        for index, begin in enumerate(range(0, length, chunk)):
            end = min(length, begin + chunk)
            if keep_states:
                states[rows, index] = _by_channel(state)
            step, _ = given.step(begin, end)
            value = given.channels(given.u, begin, end)
            decay, scan = space.of(given, step)
            b, c = (given.projection(t, begin, end) for t in (given.B, given.C))
            _, state = _fill(given, step, step * value, b, decay, scan, state)
            state = state.clone()
            y = c.mT @ scan  # [blocks, tokens, B, G, 1, D / G]
            if D is not None:
                y += given.by_group(D[None]) * value
            if given.z is not None:
                y *= F.silu(given.channels(given.z, begin, end))
            out[rows, :, begin:end] = given.tokens(y, end - begin)
        last[rows] = _by_channel(state).mT
    return out, last, states


def backward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    states: torch.Tensor,
    grad_out: torch.Tensor,
    grad_last_state: torch.Tensor | None,
    delta_softplus: bool,
    chunk: int,
) -> list[torch.Tensor]:
    """Gradients of u, delta, A, B, C, and of D, z, delta_bias, initial_state where given."""
    whole = _Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    length = u.shape[2]
    if not u.numel():
        grads = [
            torch.zeros_like(t) for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None
        ]
        if initial_state is not None:
            last = torch.zeros_like(initial_state) if grad_last_state is None else grad_last_state
            grads.append(last.clone())
        return grads
    du, ddelta, dB, dC = (t.new_empty(t.shape) for t in (u, delta, B, C))
    dz = None if z is None else z.new_empty(z.shape)
    dA = torch.zeros_like(whole.rate)
    dD, dbias = (A.new_zeros(whole.groups, 1, u.shape[1] // whole.groups) for _ in range(2))
    dfirst = None if initial_state is None else torch.empty_like(initial_state)
    space = _Space(3)
    for rows, given in whole.parts(chunk):
        grad = _first(given, None if grad_last_state is None else grad_last_state[rows])
        for index in reversed(range(-(-length // chunk))):
            begin, end = index * chunk, min(length, index * chunk + chunk)
            count = end - begin
            step, raw = given.step(begin, end)
            value, dy = (given.channels(t, begin, end) for t in (given.u, grad_out[rows]))
            b, c = (given.projection(t, begin, end) for t in (given.B, given.C))
            decay, scan, back = space.of(given, step)
            start, x = given.by_group(states[rows, index]), step * value
            product, _ = _fill(given, step, x, b, decay, scan, start)
            if given.z is not None and dz is not None:
                gate = given.channels(given.z, begin, end)
                sigmoid = gate.sigmoid()
                y = c.mT @ scan
                if D is not None:
                    y += given.by_group(D[None]) * value
                # d silu(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))
                dgate = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
                dz[rows, :, begin:end] = given.tokens(dgate, count)
                dy = dy * gate * sigmoid
            torch.mul(dy, c, out=back)
            grad = _scan_back(decay, back, product, grad)
            # [blocks, tokens, B, G, N, 1]: sums over channels
            of_c = (scan @ dy.mT).flatten(0, 1)[:count, ..., 0]
            of_b = (back @ x.mT).flatten(0, 1)[:count, ..., 0]
            dC[rows, ..., begin:end] = of_c.permute(1, 2, 3, 0)
            dB[rows, ..., begin:end] = of_b.permute(1, 2, 3, 0)
            dx = b.mT @ back
            # w = g a h, with h of the token before, in place of a
            decay *= back
            w, before = decay.flatten(0, 1), scan.flatten(0, 1)
            w[1:] *= before[:-1]
            w[0] *= start
            dstep = value * dx + torch.mul(decay, given.rate, out=back).sum(-2, keepdim=True)
            dA += (decay.mul_(step)).sum((0, 1, 2))
            dvalue = step * dx
            if D is not None:
                dvalue += given.by_group(D[None]) * dy
                dD += (dy * value).sum((0, 1, 2))
            if raw is not None:
                dstep *= raw.sigmoid()
            du[rows, :, begin:end] = given.tokens(dvalue, count)
            ddelta[rows, :, begin:end] = given.tokens(dstep, count)
            if delta_bias is not None:
                dbias += dstep.flatten(0, 1)[:count].sum((0, 1))
        if dfirst is not None:
            dfirst[rows] = _by_channel(grad).mT
    grads = [du, ddelta, _by_channel(dA).mT.contiguous(), dB, dC]
    if D is not None:
        grads.append(dD.flatten())
    if dz is not None:
        grads.append(dz)
    if delta_bias is not None:
        grads.append(dbias.flatten())
    if dfirst is not None:
        grads.append(dfirst)
    return grads
