"""Token mixers of the context encoders, all behind one call: `mixer(tokens, memory) -> tokens`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right


class Attention(nn.Module):
    """Multi-head softmax attention, exact, over [memory, tokens].

    dim: width of the tokens; num_heads must divide it.
    causal: a token sees the tokens before it in its chunk; memory is always fully visible.
    """

    def __init__(self, dim: int, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Attention: num_heads must divide dim {dim}, got {num_heads}.")
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """tokens: `[B, L, C]`; memory: `[B, M, C]`, hidden states normed as the tokens are.

        Memory is projected with today's weights: gradients reach the weights through it.
        """
        dim = tokens.shape[-1]
        query, key, value = self._heads(self.qkv(tokens), 3)  # [B, heads, L, D] each
        bias = None
        if memory is not None and memory.shape[1]:
            projected = F.linear(memory, self.qkv.weight[dim:], self.qkv.bias[dim:])
            memory_key, memory_value = self._heads(projected, 2)
            key = torch.cat([memory_key, key], dim=2)
            value = torch.cat([memory_value, value], dim=2)
            # Aligned to the end of the keys, so that memory is visible to every token.
            bias = causal_lower_right(query.shape[2], key.shape[2]) if self.causal else None
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=self.causal and bias is None
        )
        projected_out: torch.Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected_out

    def _heads(self, packed: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        batch, length, width = packed.shape
        head_dim = width // parts // self.num_heads
        split = packed.view(batch, length, parts, self.num_heads, head_dim)
        return split.permute(2, 0, 3, 1, 4).unbind(0)
