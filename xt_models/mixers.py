"""Token mixers of the context encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from xt_kernels import hyper_attention, xl_attention

ATTENTIONS: dict[str, Callable[..., Any]] = {"hyper": hyper_attention, "exact": xl_attention}


class Attention(nn.Module):
    """Multi-head softmax attention over [memory, tokens].

    dim: width of the tokens; num_heads must divide it into heads of 16 to 256, a multiple of 8.
    attention: "exact" (`xt_kernels.xl_attention`), or "hyper" (`xt_kernels.hyper_attention`), which
        is the same up to 4096 keys, memory included, and an estimate in O(L) beyond.
    causal: a token sees the tokens before it in its chunk; memory is always fully visible.
    """

    def __init__(
        self, dim: int, num_heads: int, *, attention: str = "exact", causal: bool = False
    ) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 8 or not 16 <= dim // num_heads <= 256:
            raise ValueError(
                f"Attention: num_heads must divide dim {dim} into heads of 16 to 256, a multiple "
                f"of 8, got {num_heads}."
            )
        self.num_heads, self.causal = num_heads, causal
        self.attend = ATTENTIONS[attention]
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    @property
    def head_dim(self) -> int:
        return self.proj.in_features // self.num_heads

    def forward(
        self,
        tokens: torch.Tensor,
        memory_key: torch.Tensor | None = None,
        memory_value: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mixed `[B, L, C]`, key, value `[B, heads, L, D]` of tokens `[B, L, C]`).

        memory_key, memory_value: `[B, heads, M, D]`, from `keys_and_values` or an earlier call.
        """
        query, key, value = self._heads(self.qkv(tokens), 3)
        out = self.attend(
            query,
            key,
            value,
            memory_key=memory_key,
            memory_value=memory_value,
            is_causal=self.causal,
        )
        assert isinstance(out, torch.Tensor)
        return self.proj(out.transpose(1, 2).flatten(2)), key, value

    def keys_and_values(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value `[B, heads, M, D]` of tokens `[B, M, C]`, which ask nothing themselves.

        Gradients reach the weights, whether or not they reach the tokens.
        """
        dim = tokens.shape[-1]
        projected = F.linear(tokens, self.qkv.weight[dim:], self.qkv.bias[dim:])
        key, value = self._heads(projected, 2)
        return key, value

    def _heads(self, packed: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        batch, length, _ = packed.shape
        split = packed.view(batch, length, parts, self.num_heads, self.head_dim)
        return split.permute(2, 0, 3, 1, 4).unbind(0)
