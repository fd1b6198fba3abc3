"""Token mixers of the context encoders, all behind one call: `mixer(tokens, memory) -> tokens`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from xt_kernels import xl_attention


class Attention(nn.Module):
    """Multi-head softmax attention, exact, over [memory, tokens], by `xt_kernels.xl_attention`.

    dim: width of the tokens; num_heads must divide it into heads of 16 to 256, a multiple of 8.
    causal: a token sees the tokens before it in its chunk; memory is always fully visible.
    """

    def __init__(self, dim: int, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 8 or not 16 <= dim // num_heads <= 256:
            raise ValueError(
                f"Attention: num_heads must divide dim {dim} into heads of 16 to 256, a multiple "
                f"of 8, got {num_heads}."
            )
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """tokens: `[B, L, C]`; memory: `[B, M, C]`, hidden states normed as the tokens are.

        Memory is projected with today's weights: gradients reach the weights through it.
        """
        dim = tokens.shape[-1]
        query, key, value = self._heads(self.qkv(tokens), 3)  # [B, heads, L, D] each
        memory_key = memory_value = None
        if memory is not None:
            projected = F.linear(memory, self.qkv.weight[dim:], self.qkv.bias[dim:])
            memory_key, memory_value = self._heads(projected, 2)
        out = xl_attention(query, key, value, memory_key, memory_value, is_causal=self.causal)
        assert isinstance(out, torch.Tensor)
        projected_out: torch.Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected_out

    def _heads(self, packed: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        batch, length, width = packed.shape
        head_dim = width // parts // self.num_heads
        split = packed.view(batch, length, parts, self.num_heads, head_dim)
        return split.permute(2, 0, 3, 1, 4).unbind(0)
