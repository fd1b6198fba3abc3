"""CPU form of `selective_scan`: all channels and states of a chunk of tokens at a time.

A chunk is cut into blocks of `_BLOCK` tokens that are scanned side by side, so that an operation
works on many tokens and PyTorch's overhead is paid once for all blocks:

1. each block from a zero state, which gives its end e_g,
2. the blocks' true starts s_{g+1} = exp(A sum of d over block g) s_g + e_g,
3. each block from its true start.

Backward runs the same way from the last token to the first, on states computed again from the
chunk's start. Memory is that of a chunk, a few tensors of about `_ELEMENTS` numbers. Tensors are
`[blocks, _BLOCK, B, G, N, D / G]`: channels last, so that broadcasting over states is cheap. exp(x)
is exp2(x log2(e)), which PyTorch computes four times as fast on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LOG2E = 1.4426950408889634
_BLOCK = 16
_ELEMENTS = 2**21


def chunk_length(elements: int) -> int:
    """Tokens of a chunk, for so many states in all channels and the batch: 16 to 512."""
    length = 32 * _BLOCK
    while length > _BLOCK and length * elements > _ELEMENTS:
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

    @property
    def rate(self) -> torch.Tensor:
        """A as `[G, N, D / G]`, contiguous: products with it are five times as fast."""
        return self.by_group(self.A.T).contiguous()

    def by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[.., N, D]` or `[.., 1, D]` as `[.., G, N, D / G]`."""
        return _unflatten(tensor, -1, (self.groups, -1)).movedim(-2, -3)

    def channels(self, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Tokens of `[B, D, L]` as `[blocks, _BLOCK, B, G, 1, D / G]`, zero behind the end."""
        sizes = tensor.shape[0], self.groups, 1, tensor.shape[1] // self.groups
        return _unflatten(self._blocks(tensor, begin, end), 2, sizes)

    def projection(self, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Tokens of `[B, G, N, L]` as `[blocks, _BLOCK, B, G, N, 1]`, zero behind the end."""
        return _unflatten(self._blocks(tensor, begin, end), 2, (*tensor.shape[:3], 1))

    def _blocks(self, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Tokens of `[.., L]` as `[blocks, _BLOCK, ..]`, the axes before L made one."""
        # Rows first: PyTorch transposes a whole matrix several times faster than a part of one.
        part = tensor[..., begin:end].to(self.A.dtype).contiguous().flatten(0, -2)
        part = part.t().contiguous()
        missing = -len(part) % _BLOCK
        if missing:
            part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
        return _unflatten(part, 0, (-1, _BLOCK))

    def step(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(d, what softplus was applied to or None), both as `channels` gives them."""
        raw = self.channels(self.delta, begin, end)
        if self.delta_bias is not None:
            raw = raw + self.by_group(self.delta_bias[None])
        step = F.softplus(raw) if self.softplus else raw
        missing = -(end - begin) % _BLOCK
        if missing:  # tokens that are not there leave the state as it is
            step = step.clone()
            step[-1, -missing:] = 0
        return step, raw if self.softplus else None

    def tokens(self, tensor: torch.Tensor, count: int) -> torch.Tensor:
        """The first tokens of `[blocks, _BLOCK, B, G, 1, D / G]` as `[B, D, count]`."""
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
        for k in range(1, _BLOCK):
            torch.addcmul(scan[:, k], decay[:, k], end, out=end)
        starts = torch.empty_like(end)
        for g in range(len(scan)):
            starts[g] = start
            start = torch.addcmul(end[g], whole[g], start)
    for k in range(_BLOCK):
        torch.addcmul(scan[:, k], decay[:, k], starts, out=scan[:, k])
        starts = scan[:, k]
    return scan[-1, -1]


def _scan_back(
    decay: torch.Tensor, scan: torch.Tensor, whole: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """g_t = c_t + a_{t+1} g_{t+1} over all tokens of a chunk, in place of c; returns a_1 g_1.

    last: what reaches the chunk's last state from behind. The others as in `_scan`.
    """
    lasts = last[None]
    if len(scan) > 1:
        end = scan[:, -1].clone()
        for k in reversed(range(_BLOCK - 1)):
            torch.addcmul(scan[:, k], decay[:, k + 1], end, out=end)
        end *= decay[:, 0]
        lasts = torch.empty_like(end)
        for g in reversed(range(len(scan))):
            lasts[g] = last
            last = torch.addcmul(end[g], whole[g], last)
    scan[:, -1] += lasts
    for k in reversed(range(_BLOCK - 1)):
        torch.addcmul(scan[:, k], decay[:, k + 1], scan[:, k + 1], out=scan[:, k])
    return decay[0, 0] * scan[0, 0]


class _Space:
    """Tensors `[blocks, _BLOCK, B, G, N, D / G]` that every chunk fills again.

    New ones for each chunk would cost as much as the arithmetic: their pages are mapped afresh.
    """

    def __init__(self, given: _Inputs, chunk: int, count: int) -> None:
        batch, dim, length = given.u.shape
        blocks = -(-min(chunk, length) // _BLOCK)
        states, groups = given.A.shape[1], given.groups
        shape = blocks, _BLOCK, batch, groups, states, dim // groups
        self.tensors = [given.A.new_empty(shape) for _ in range(count)]

    def of(self, step: torch.Tensor) -> list[torch.Tensor]:
        return [t[: len(step)] for t in self.tensors]


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
    """`[B, G, N, D / G]` as `[B, N, D]`."""
    return state.movedim(-3, -2).flatten(-2)


def _result(state: torch.Tensor) -> torch.Tensor:
    """`[.., G, N, D / G]` as a new `[.., D, N]`."""
    return _by_channel(state).mT.clone(memory_format=torch.contiguous_format)


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
    given = _Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    batch, dim, length = u.shape
    out = torch.empty_like(u)
    if not u.numel():
        last = A.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state
        chunks = -(-length // chunk) if keep_states else 0
        return out, last.clone(), A.new_empty(batch, chunks, A.shape[1], dim)
    state = _first(given, initial_state)
    kept, space = [], _Space(given, chunk, 2)
    for begin in range(0, length, chunk):
        end = min(length, begin + chunk)
        if keep_states:
            kept.append(_by_channel(state))
        step, _ = given.step(begin, end)
        value = given.channels(u, begin, end)
        decay, scan = space.of(step)
        _, state = _fill(
            given, step, step * value, given.projection(B, begin, end), decay, scan, state
        )
        state = state.clone()
        y = given.projection(C, begin, end).mT @ scan  # [blocks, _BLOCK, B, G, 1, D / G]
        if D is not None:
            y += given.by_group(D[None]) * value
        if z is not None:
            y *= F.silu(given.channels(z, begin, end))
        out[:, :, begin:end] = given.tokens(y, end - begin)
    states = torch.stack(kept, 1) if kept else A.new_empty(batch, 0, A.shape[1], dim)
    return out, _result(state), states


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
    given = _Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
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
    dA = torch.zeros_like(given.rate)
    dD, dbias = (A.new_zeros(given.groups, 1, u.shape[1] // given.groups) for _ in range(2))
    grad = _first(given, grad_last_state)
    space = _Space(given, chunk, 3)
    for index in reversed(range(-(-length // chunk))):
        begin, end = index * chunk, min(length, index * chunk + chunk)
        count = end - begin
        step, raw = given.step(begin, end)
        value, dy = given.channels(u, begin, end), given.channels(grad_out, begin, end)
        b, c = given.projection(B, begin, end), given.projection(C, begin, end)
        decay, scan, back = space.of(step)
        start, x = given.by_group(states[:, index]), step * value
        whole, _ = _fill(given, step, x, b, decay, scan, start)
        if z is not None and dz is not None:
            gate = given.channels(z, begin, end)
            sigmoid = gate.sigmoid()
            y = c.mT @ scan
            if D is not None:
                y += given.by_group(D[None]) * value
            # d silu(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))
            dgate = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
            dz[:, :, begin:end] = given.tokens(dgate, count)
            dy = dy * gate * sigmoid
        torch.mul(dy, c, out=back)
        grad = _scan_back(decay, back, whole, grad)
        # [blocks, _BLOCK, B, G, N, 1]: sums over channels
        dC[..., begin:end] = (scan @ dy.mT).flatten(0, 1)[:count, ..., 0].permute(1, 2, 3, 0)
        dB[..., begin:end] = (back @ x.mT).flatten(0, 1)[:count, ..., 0].permute(1, 2, 3, 0)
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
        du[:, :, begin:end] = given.tokens(dvalue, count)
        ddelta[:, :, begin:end] = given.tokens(dstep, count)
        if delta_bias is not None:
            dbias += dstep.flatten(0, 1)[:count].sum((0, 1))
    grads = [du, ddelta, _result(dA), dB, dC]
    if D is not None:
        grads.append(dD.flatten())
    if dz is not None:
        grads.append(dz)
    if delta_bias is not None:
        grads.append(dbias.flatten())
    if initial_state is not None:
        grads.append(_result(grad))
    return grads
