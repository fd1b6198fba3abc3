"""CPU form of `selective_scan`: all channels and states of a chunk of tokens at a time.

Tokens of many states are scanned one by one. Tokens of few would leave PyTorch's operations with
little but overhead; there the chunk is a tree: every second token takes up the one before it, these
are scanned by themselves, and the others then take up their result, three operations a level, each
on half the tokens of the level before. Backward scans from the last token to the first, on states
computed again from the chunk's start. Memory is that of a chunk, a few tensors of about
`_ELEMENTS` numbers, for as many rows of the batch as fit. Tensors are `[tokens, B, G, N, D / G]`:
channels last, so that broadcasting over states is cheap. exp(x) is exp2(x log2(e)), which PyTorch
computes four times as fast on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

LOG2E = 1.4426950408889634

# 4 MiB of fp32. On one core of an AMD EPYC (family 26): 2**19 and 2**21 take 1.1 times as long at
# 8,192 tokens of 6,144 states, 2**18 1.3 times.
_ELEMENTS = 2**20

# States of a token, in all rows of a batch, from which tokens are scanned one by one: a tree goes
# through memory three times as often, and one operation a token costs as much as so many states.
_ONE_BY_ONE = 2**12


def chunk_length(states: int) -> int:
    """Tokens of a chunk, for so many states a token: 16 to 512."""
    length = 512
    while length > 16 and length * states > _ELEMENTS:
        length //= 2
    return length


def _unflatten(tensor: torch.Tensor, axis: int, sizes: tuple[int, ...]) -> torch.Tensor:
    view: torch.Tensor = tensor.unflatten(axis, sizes)  # type: ignore[no-untyped-call]
    return view


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), to a few roundings also where it is tiny.

    PyTorch's has a log1p that goes number by number: on one core of an AMD EPYC (family 26) it
    takes 10 ns for each, most of a forward pass; this takes a few.
    """
    y = x.abs().neg_().exp_()
    w = y + 1
    # log(w) y / (w - 1) undoes the rounding of 1 + y; where that leaves 0 / 0, log(1 + y) is y.
    return w.log().div_(w.sub_(1)).nan_to_num_(1.0).mul_(y).add_(x.relu())


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
        """Tokens of `[B, D, L]` as `[tokens, B, G, 1, D / G]`."""
        sizes = tensor.shape[0], self.groups, 1, tensor.shape[1] // self.groups
        return _unflatten(self._tokens_first(tensor, begin, end), 1, sizes)

    def projection(self, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Tokens of `[B, G, N, L]` as `[tokens, B, G, N, 1]`."""
        return _unflatten(self._tokens_first(tensor, begin, end), 1, (*tensor.shape[:3], 1))

    def _tokens_first(self, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Tokens of `[.., L]` as `[tokens, ..]`, the axes before L made one."""
        # Rows first: PyTorch transposes a whole matrix several times faster than a part of one.
        part = tensor[..., begin:end].to(self.A.dtype).contiguous().flatten(0, -2)
        return part.t().contiguous()

    def step(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(d, what softplus was applied to or None), both as `channels` gives them."""
        raw = self.channels(self.delta, begin, end)
        if self.delta_bias is not None:
            raw = raw + self.by_group(self.delta_bias[None])
        step = _softplus(raw) if self.softplus else raw
        return step, raw if self.softplus else None

    def channels_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[tokens, B, G, 1, D / G]` as `[B, D, tokens]`."""
        rows = tensor.flatten(1).contiguous().t().contiguous()
        return _unflatten(rows, 0, (self.u.shape[0], -1))


class _Tokens(NamedTuple):
    """Tokens `[tokens, B, G, N, D / G]`, and each of them as a view where they are scanned so."""

    whole: torch.Tensor
    each: list[torch.Tensor]

    def part(self, first: int, last: int | None) -> _Tokens:
        return _Tokens(self.whole[first:last], self.each[first:last])


class _Space:
    """Tokens that every chunk fills again, one more than it has.

    New tensors for each chunk would cost as much as the arithmetic: their pages are mapped afresh.
    So would new views of all tokens.
    """

    def __init__(self, count: int) -> None:
        self.tensors: list[torch.Tensor | None] = [None] * count
        self.made: dict[tuple[int, ...], list[_Tokens]] = {}

    def of(self, given: _Inputs, step: torch.Tensor) -> list[_Tokens]:
        shape = (step.shape[0] + 1, *step.shape[1:3], given.A.shape[1], step.shape[4])
        if shape not in self.made:
            self.made[shape] = [self._tokens(k, shape, step) for k in range(len(self.tensors))]
        return self.made[shape]

    def _tokens(self, number: int, shape: tuple[int, ...], like: torch.Tensor) -> _Tokens:
        size = math.prod(shape)
        kept = self.tensors[number]
        if kept is None or kept.numel() < size:
            self.tensors[number] = kept = like.new_empty(size)
        whole = kept[:size].view(shape)
        return _Tokens(whole, list(whole.unbind(0)) if whole[0].numel() >= _ONE_BY_ONE else [])


def _scan(decay: _Tokens, scan: _Tokens, space: _Tokens, back: bool = False) -> None:
    """h_t = b_t + a_t h_{t-1}, or with `back` h_t = b_t + a_t h_{t+1}, from zero, in place of b.

    decay: a, whose value for the token that is scanned first is not used; scan: b; space: room.
    """
    if not scan.each:
        return _scan_tree(decay.whole, scan.whole, space.whole, back)
    order = slice(None, None, -1 if back else 1)
    decays, states = decay.each[order], scan.each[order]
    if len(states) > 1 and _is_in_order():  # a list must not be empty
        torch._foreach_addcmul_(states[1:], decays[1:], states[:-1])
        return
    for a, state, b in zip(decays[1:], states, states[1:], strict=False):
        b.addcmul_(a, state)


@lru_cache(maxsize=1)
def _is_in_order() -> bool:
    """Whether one call of `_foreach_addcmul_` takes its tensors one after the other, as a loop in
    Python does, for all tokens: 0.93 of the time of a pass. PyTorch does so on a CPU, but does not
    promise it.
    """
    ones, sums = (torch.ones(64, 2**12, device="cpu", dtype=torch.float32) for _ in range(2))
    torch._foreach_addcmul_(sums[1:].unbind(0), ones[1:].unbind(0), sums[:-1].unbind(0))
    return bool((sums[-1] == len(sums)).all())


def _scan_tree(decay: torch.Tensor, scan: torch.Tensor, space: torch.Tensor, back: bool) -> None:
    """What `_scan` does, three operations a level."""
    count, half = len(scan), len(scan) // 2
    if not half:
        return
    # The token scanned first is one of `early`; each of `late` has one of `early` before it.
    lead, others = (count - 1) % 2 if back else 0, count - half
    early, late = scan[lead::2], scan[1 - lead :: 2]
    early_decay, late_decay = decay[lead::2], decay[1 - lead :: 2]
    before = slice(others - half, others) if back else slice(half)
    late.addcmul_(late_decay, early[before])
    product = torch.mul(late_decay, early_decay[before], out=space[:half])
    _scan_tree(product, late, space[half:], back)
    if back:
        early[:-1].addcmul_(early_decay[:-1], late[half - others + 1 :])
    else:
        early[1:].addcmul_(early_decay[1:], late[: others - 1])


def _fill(
    rate: torch.Tensor, step: torch.Tensor, x: torch.Tensor, projection: torch.Tensor,
    start: torch.Tensor, decay: _Tokens, scan: _Tokens, space: _Tokens,
) -> None:  # fmt: skip
    """a_t in `decay` and h_t in `scan`, from the state `start`."""
    # Folded into A, log2(e) would shift all tokens alike.
    torch.mul(step * LOG2E, rate, out=decay.whole).exp2_()
    torch.mul(x, projection, out=scan.whole)
    scan.whole[0].addcmul_(decay.whole[0], start)
    _scan(decay, scan, space)


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
    rate, space = whole.rate, _Space(3)
    for rows, given in whole.parts(chunk):
        state = _first(given, None if initial_state is None else initial_state[rows])
        for index, begin in enumerate(range(0, length, chunk)):
            end = min(length, begin + chunk)
            if keep_states:
                states[rows, index] = _by_channel(state)
            step, _ = given.step(begin, end)
            value = given.channels(given.u, begin, end)
            decay, scan, room = (t.part(0, end - begin) for t in space.of(given, step))
            b, c = (given.projection(t, begin, end) for t in (given.B, given.C))
            _fill(rate, step, step * value, b, state, decay, scan, room)
            state = scan.whole[-1].clone()
            y = c.mT @ scan.whole  # [tokens, B, G, 1, D / G]
            if D is not None:
                y += given.by_group(D[None]) * value
            y = given.channels_first(y)
            if given.z is not None:
                y *= F.silu(given.z[..., begin:end].to(y.dtype))
            out[rows, :, begin:end] = y
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
    rate = whole.rate
    dA = torch.zeros_like(rate)
    dD, dbias = (A.new_zeros(whole.groups, 1, u.shape[1] // whole.groups) for _ in range(2))
    dfirst = None if initial_state is None else torch.empty_like(initial_state)
    space = _Space(4)
    for rows, given in whole.parts(chunk):
        grad = _first(given, None if grad_last_state is None else grad_last_state[rows])
        for index in reversed(range(-(-length // chunk))):
            begin, end = index * chunk, min(length, index * chunk + chunk)
            count = end - begin
            step, raw = given.step(begin, end)
            value, dy = (given.channels(t, begin, end) for t in (given.u, grad_out[rows]))
            b, c = (given.projection(t, begin, end) for t in (given.B, given.C))
            decays, *others = space.of(given, step)
            scan, back, room = (t.part(0, count) for t in others)
            a, h, g = decays.whole[:count], scan.whole, back.whole
            start, x = given.by_group(states[rows, index]), step * value
            _fill(rate, step, x, b, start, decays.part(0, count), scan, room)
            if given.z is not None and dz is not None:
                gate = given.channels(given.z, begin, end)
                sigmoid = gate.sigmoid()
                y = c.mT @ h
                if D is not None:
                    y += given.by_group(D[None]) * value
                # d silu(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))
                dgate = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
                dz[rows, :, begin:end] = given.channels_first(dgate)
                dy = dy * gate * sigmoid
            torch.mul(dy, c, out=g)
            g[-1] += grad
            # g_t = c_t + a_{t+1} g_{t+1}
            _scan(decays.part(1, None), back, room, back=True)
            grad = a[0] * g[0]
            # [tokens, B, G, N]: sums over channels
            of_c, of_b = (h @ dy.mT)[..., 0], (g @ x.mT)[..., 0]
            dC[rows, ..., begin:end] = of_c.permute(1, 2, 3, 0)
            dB[rows, ..., begin:end] = of_b.permute(1, 2, 3, 0)
            dx = b.mT @ g
            # w = g a h, with h of the token before, in place of a
            a *= g
            a[1:] *= h[:-1]
            a[0] *= start
            dstep = value * dx + torch.mul(a, rate, out=g).sum(-2, keepdim=True)
            dA += a.mul_(step).sum((0, 1))
            dvalue = step * dx
            if D is not None:
                dvalue += given.by_group(D[None]) * dy
                dD += (dy * value).sum((0, 1))
            if raw is not None:
                dstep *= raw.sigmoid()
            du[rows, :, begin:end] = given.channels_first(dvalue)
            ddelta[rows, :, begin:end] = given.channels_first(dstep)
            if delta_bias is not None:
                dbias += dstep.sum((0, 1))
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
