"""Context encoders: norm, mixer, norm, gated MLP, repeated, with memory that goes in and comes out.

Transformer-XL recurrence over chunks (Dai et al. 2019; "xT", Gupta et al. 2024): layer l of chunk k
attends to the hidden states that entered layer l in the chunks before it,

    h_k^{l+1} = Block_l(h_k^l, memory = SG[h_{k-m}^l .. h_{k-1}^l])

SG stops the gradient to the hidden states; they are normed and projected with today's weights,
which do learn through them. With n layers and memory of m chunks, chunk k sees n m chunks back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .mixers import ATTENTIONS, Attention

MEMORIES = ("hidden", "kv")
GRADIENTS = ("stop", "through", "truncated")


class Memory(NamedTuple):
    """What the chunks before left for the next one: a plain value to save, move or compare.

    states: one tensor, T tokens of all remembered chunks. "hidden": what entered each layer,
        `[depth, B, T, C]`. "kv": its keys and values, `[depth, 2, B, heads, T, D]`. Mamba: of the
        scan and of the convolution, `[depth, B, d_inner, N + d_conv - 1]`.
    lengths: tokens of each remembered chunk, in the order of states. A new chunk takes the place of
        the oldest one. Mamba: (N, d_conv - 1).
    seen: chunks so far, those forgotten included.
    """

    states: torch.Tensor
    lengths: tuple[int, ...]
    seen: int

    def detach(self) -> Memory:
        """The same values, without the graph that made them."""
        return self._replace(states=self.states.detach())

    def to(self, *args: Any, **kwargs: Any) -> Memory:
        """On another device or in another dtype, as `torch.Tensor.to`."""
        return self._replace(states=self.states.to(*args, **kwargs))

    def equal(self, other: Memory) -> bool:
        """Whether both hold the same values."""
        return self[1:] == other[1:] and torch.equal(self.states, other.states)


torch.serialization.add_safe_globals([Memory])  # torch.load(weights_only=True) takes it


class GatedMLP(nn.Module):
    """`down(GELU(gate(x)) * up(x))`, no biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """Pre-norm residual layer: RMSNorm, mixer, RMSNorm, gated MLP."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, attention: str, causal: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = Attention(dim, num_heads, attention=attention, causal=causal)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = GatedMLP(dim, int(dim * mlp_ratio))

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None, *, is_kv: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x `[B, L, C]`, its key and value `[B, heads, L, D]`).

        state: this layer's part of `Memory.states`; is_kv tells its kind.
        """
        past: tuple[torch.Tensor, ...] = ()
        if state is not None:
            past = state.unbind(0) if is_kv else self.mixer.keys_and_values(self.norm1(state))
        mixed, key, value = self.mixer(self.norm1(x), *past)
        x = x + mixed
        x = x + self.mlp(self.norm2(x))
        return x, key, value


class ContextEncoder(nn.Module):
    """Mixes context over a sequence of tokens: `tokens, memory = encoder(tokens, memory)`.

    dim: token width. depth: layers. num_heads: must divide dim. mlp_ratio: MLP width / dim.
    attention: "exact", or "hyper": exact up to 4096 keys, memory included, and HyperAttention in
        O(L) beyond.
    memory: "hidden" remembers the hidden states and projects them with today's weights (the paper's
        equation); "kv" remembers keys and values, which saves the projection. While no gradient is
        recorded, "kv" overwrites the oldest chunk of the memory it is given and returns it.
    memory_chunks: how many earlier chunks each layer remembers; 0 keeps no memory.
    gradient: "stop" (the paper): none to the chunks before. "through": to all of them; "truncated":
        within runs of `gradient_chunks` chunks. Both keep the tokens and the memory of each chunk
        and recompute the rest of it in the backward pass, so that activations do not grow with the
        number of chunks.
    causal: a token sees only tokens before it (and all of memory).

    State dict: `layers.<i>.norm1.weight`, `.mixer.qkv.{weight, bias}` (rows: queries, keys,
    values), `.mixer.proj.{weight, bias}`, `.norm2.weight`, `.mlp.{gate, up, down}.weight`.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 2,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        *,
        attention: str = "hyper",
        memory: str = "hidden",
        memory_chunks: int = 0,
        gradient: str = "stop",
        gradient_chunks: int = 4,
        causal: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for option, value, known in (
            ("attention", attention, ATTENTIONS),
            ("memory", memory, MEMORIES),
            ("gradient", gradient, GRADIENTS),
        ):
            if value not in known:
                raise ValueError(
                    f"{name}: {option} must be one of {', '.join(known)}, got {value!r}."
                )
        for option, number, least in (
            ("depth", depth, 1),
            ("memory_chunks", memory_chunks, self._least_memory),
            ("gradient_chunks", gradient_chunks, 1),
        ):
            if number < least:
                raise ValueError(f"{name}: {option} must be at least {least}, got {number}.")
        self.dim, self.num_heads, self.attention, self.memory = dim, num_heads, attention, memory
        self.memory_chunks = memory_chunks
        self.gradient, self.gradient_chunks = gradient, gradient_chunks
        self.layers = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, attention, causal) for _ in range(depth)
        )

    _least_memory = 0

    @property
    def reach(self) -> int:
        """How many chunks back a token can see: depth x memory_chunks."""
        return len(self.layers) * self.memory_chunks

    def state_shape(self, batch: int, length: int) -> list[int]:
        """Shape of `Memory.states` for `length` tokens of all remembered chunks."""
        depth = len(self.layers)
        if self.memory == "hidden":
            return [depth, batch, length, self.dim]
        return [depth, 2, batch, self.num_heads, length, self.dim // self.num_heads]

    def forward(
        self, tokens: torch.Tensor, memory: Memory | None = None
    ) -> tuple[torch.Tensor, Memory | None]:
        """tokens: `[B, L, C]` of this chunk. memory: what the call before returned, None at first.

        Chunks may differ in length. Returns the tokens and the memory for the next chunk (None if
        memory_chunks is 0).
        Raises ValueError if the memory has another kind, depth, batch, width, dtype or device.
        """
        if tokens.dim() != 3 or tokens.shape[2] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: tokens must be [B, L, C] = [*, *, {self.dim}], "
                f"got {list(tokens.shape)}."
            )
        if memory is not None:
            self._check_memory(tokens, memory)
            is_cut = self.gradient == "truncated" and memory.seen % self.gradient_chunks == 0
            if self.gradient == "stop" or is_cut:
                memory = memory.detach()
        states = None if memory is None else memory.states
        slot = self._slot(memory, tokens.shape[1])
        if torch.is_grad_enabled() and self.memory_chunks and self.gradient != "stop":
            tokens, new = checkpoint(
                self._mix, tokens, states, None, use_reentrant=False, preserve_rng_state=False
            )
        else:
            tokens, new = self._mix(tokens, states, slot)
        if not self.memory_chunks:
            return tokens, None
        return tokens, self._remember(memory, new, tokens.shape[1])

    def _slot(self, memory: Memory | None, length: int) -> slice | None:
        """Where the keys and values of a chunk may be written over the oldest ones, if at all."""
        if memory is None or self.memory != "kv" or torch.is_grad_enabled():
            return None
        oldest = memory.seen % self.memory_chunks
        if len(memory.lengths) < self.memory_chunks or memory.lengths[oldest] != length:
            return None
        start = sum(memory.lengths[:oldest])
        return slice(start, start + length)

    def _mix(
        self, tokens: torch.Tensor, states: torch.Tensor | None, slot: slice | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens and what this chunk adds to `states`, None if it is there already."""
        is_kv, keeps = self.memory == "kv", self.memory_chunks and slot is None
        new = []
        for i, layer in enumerate(self.layers):
            state = None if states is None else states[i]
            if keeps and not is_kv:
                new.append(tokens)
            tokens, key, value = layer(tokens, state, is_kv=is_kv)
            if keeps and is_kv:
                new.append(torch.stack([key, value]))
            elif slot is not None and state is not None:
                state[0, :, :, slot] = key
                state[1, :, :, slot] = value
        return tokens, torch.stack(new) if new else None

    def _remember(self, memory: Memory | None, new: torch.Tensor | None, length: int) -> Memory:
        """The memory with the new chunk in the place of the oldest, or behind if there is room."""
        if new is not None and self.gradient == "stop":
            new = new.detach()
        if memory is None:
            assert new is not None
            return Memory(new, (length,), 1)
        if new is None:
            return memory._replace(seen=memory.seen + 1)
        lengths = list(memory.lengths)
        place = memory.seen % self.memory_chunks
        start = sum(lengths[:place])
        end = start + sum(lengths[place : place + 1])
        around = memory.states[..., :start, :], memory.states[..., end:, :]
        parts = [around[0], new, around[1]] if sum(t.shape[-2] for t in around) else [new]
        lengths[place : place + 1] = [length]
        states = new if len(parts) == 1 else torch.cat(parts, dim=-2)
        return Memory(states, tuple(lengths), memory.seen + 1)

    def _check_memory(self, tokens: torch.Tensor, memory: Memory) -> None:
        def fail(rule: str, got: object) -> None:
            raise ValueError(f"{type(self).__name__}: memory must {rule}, got {got}.")

        if not isinstance(memory, Memory):
            fail("be a Memory, as an earlier call returned it, or None", type(memory).__name__)
        if len(memory.lengths) > self.memory_chunks:
            fail(f"hold at most memory_chunks = {self.memory_chunks} chunks", len(memory.lengths))
        expected = self.state_shape(tokens.shape[0], sum(memory.lengths))
        if list(memory.states.shape) != expected:
            layout = "[depth, B, T, C]" if self.memory == "hidden" else "[depth, 2, B, heads, T, D]"
            fail(f'hold "{self.memory}" states {layout} = {expected}', list(memory.states.shape))
        if memory.states.dtype != tokens.dtype or memory.states.device != tokens.device:
            fail(
                f"have the dtype and device of tokens, {tokens.dtype} on {tokens.device}",
                f"{memory.states.dtype} on {memory.states.device}",
            )


class XLContextEncoder(ContextEncoder):
    """`ContextEncoder` with Transformer-XL memory of `memory_chunks` earlier chunks, 1 or more."""

    _least_memory = 1

    def __init__(
        self,
        dim: int = 768,
        depth: int = 2,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        *,
        attention: str = "hyper",
        memory: str = "hidden",
        memory_chunks: int = 1,
        gradient: str = "stop",
        gradient_chunks: int = 4,
        causal: bool = False,
    ) -> None:
        super().__init__(
            dim,
            depth,
            num_heads,
            mlp_ratio,
            attention=attention,
            memory=memory,
            memory_chunks=memory_chunks,
            gradient=gradient,
            gradient_chunks=gradient_chunks,
            causal=causal,
        )
