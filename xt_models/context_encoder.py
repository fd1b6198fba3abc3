"""Context encoders: norm, mixer, norm, gated MLP, repeated, with memory that goes in and comes out.

Transformer-XL recurrence over chunks (Dai et al. 2019; "xT", Gupta et al. 2024): layer l of chunk k
attends to the hidden states that entered layer l in the chunks before it,

    h_k^{l+1} = Block_l(h_k^l, memory = SG[h_{k-m}^l .. h_{k-1}^l])

SG stops the gradient to the hidden states; they are normed and projected with today's weights,
which do learn through them. With n layers and memory of m chunks, chunk k sees n m chunks back.
"""

from __future__ import annotations

import torch
from torch import nn

from .mixers import Attention


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

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = Attention(dim, num_heads, causal=causal)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = GatedMLP(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = None if memory is None else self.norm1(memory)
        x = x + self.mixer(self.norm1(x), memory)
        x = x + self.mlp(self.norm2(x))
        return x


class ContextEncoder(nn.Module):
    """Mixes context over a sequence of tokens: `tokens, memory = encoder(tokens, memory)`.

    dim: token width. depth: layers. num_heads: must divide dim. mlp_ratio: MLP width / dim.
    causal: a token sees only tokens before it (and all of memory).
    memory_chunks: how many earlier chunks each layer remembers; 0 keeps no memory.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 2,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        *,
        causal: bool = False,
        memory_chunks: int = 0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"ContextEncoder: depth must be at least 1, got {depth}.")
        if memory_chunks < 0:
            raise ValueError(
                f"ContextEncoder: memory_chunks must be at least 0, got {memory_chunks}."
            )
        self.dim, self.memory_chunks = dim, memory_chunks
        self.layers = nn.ModuleList(Block(dim, num_heads, mlp_ratio, causal) for _ in range(depth))

    @property
    def reach(self) -> int:
        """How many chunks back a token can see: depth x memory_chunks."""
        return len(self.layers) * self.memory_chunks

    def forward(
        self, tokens: torch.Tensor, memory: Memory | None = None
    ) -> tuple[torch.Tensor, Memory | None]:
        """tokens: `[B, L, C]` of this chunk. memory: what the call before returned, None at first.

        Returns the tokens and the memory for the next chunk (None if memory_chunks is 0).
        Raises ValueError if the memory has another depth, batch, width, dtype or device.
        """
        if memory is not None:
            self._check_memory(tokens, memory)
        kept = []
        for i, layer in enumerate(self.layers):
            past = [] if memory is None else [chunk[i] for chunk in memory]
            kept.append(tokens.detach())
            tokens = layer(tokens, torch.cat(past, dim=1) if past else None)
        if not self.memory_chunks:
            return tokens, None
        chunks = (*(memory or ()), torch.stack(kept))
        return tokens, chunks[-self.memory_chunks :]

    def _check_memory(self, tokens: torch.Tensor, memory: Memory) -> None:
        if len(memory) > self.memory_chunks:
            raise ValueError(
                f"ContextEncoder: memory must hold at most memory_chunks = {self.memory_chunks} "
                f"chunks, got {len(memory)}."
            )
        depth, batch = len(self.layers), tokens.shape[0]
        for chunk in memory:
            shape = list(chunk.shape)
            if [*shape[:2], *shape[3:]] != [depth, batch, self.dim]:
                raise ValueError(
                    f"ContextEncoder: memory must hold chunks [depth, B, M, C] = "
                    f"[{depth}, {batch}, *, {self.dim}], got {shape}."
                )
            if chunk.dtype != tokens.dtype or chunk.device != tokens.device:
                raise ValueError(
                    f"ContextEncoder: memory must have the dtype and device of tokens, "
                    f"{tokens.dtype} on {tokens.device}, got {chunk.dtype} on {chunk.device}."
                )


class XLContextEncoder(ContextEncoder):
    """`ContextEncoder` with Transformer-XL memory of `memory_chunks` earlier chunks."""

    def __init__(
        self,
        dim: int = 768,
        depth: int = 2,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        *,
        causal: bool = False,
        memory_chunks: int = 1,
    ) -> None:
        if memory_chunks < 1:
            raise ValueError(
                f"XLContextEncoder: memory_chunks must be at least 1, got {memory_chunks}."
            )
        super().__init__(
            dim, depth, num_heads, mlp_ratio, causal=causal, memory_chunks=memory_chunks
        )


Memory = tuple[torch.Tensor, ...]
"""One tensor `[depth, B, M, C]` a remembered chunk, oldest first: the input of every layer."""
