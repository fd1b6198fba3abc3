"""`xl_attention` as custom ops: one schema for CPU and CUDA, opaque to torch.compile.

`forward` is differentiable and `backward` is its gradient; a second derivative does not exist, and
asking for it raises. Triton is imported where a CUDA tensor arrives.
"""

from __future__ import annotations

from typing import Any

import torch

from . import eager


@torch.library.custom_op("xt::xl_attention_fwd", mutates_args=())
def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[B, H, L, D]`, lse `[B, H, L]`); memory_key and memory_value come together."""
    inputs = (query, key, value, memory_key, memory_value)
    if not query.is_cuda:
        return eager.forward(*inputs, scale, is_causal)
    from . import kernels

    with torch.cuda.device(query.device):
        return kernels.launch_forward(*inputs, scale, is_causal)


@forward.register_fake
def _(query: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.custom_op("xt::xl_attention_bwd", mutates_args=())
def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    needs_memory: bool,
) -> list[torch.Tensor]:
    """Gradients of query, key and value; of memory_key and memory_value too if needs_memory."""
    inputs = (query, key, value, memory_key, memory_value, out, lse, grad_out, grad_lse)
    if not query.is_cuda:
        return eager.backward(*inputs, scale, is_causal, needs_memory)
    from . import kernels

    with torch.cuda.device(query.device):
        return kernels.launch_backward(*inputs, scale, is_causal, needs_memory)


@backward.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    needs_memory: bool,
) -> list[torch.Tensor]:
    inputs = [query, key, value]
    if needs_memory:
        assert memory_key is not None and memory_value is not None
        inputs += [memory_key, memory_value]
    return [torch.empty_like(t) for t in inputs]


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, memory_key, memory_value, ctx.scale, ctx.is_causal = inputs
    ctx.save_for_backward(query, key, value, memory_key, memory_value, *output)
    # None tells that lse is in no loss, which saves work.
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    *inputs, out, lse = ctx.saved_tensors
    needs_memory = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_lse is not None:
        grad_lse = grad_lse.to(lse.dtype)
    grads = backward(*inputs, out, lse, grad_out, grad_lse, ctx.scale, ctx.is_causal, needs_memory)
    grads = grads if needs_memory else [*grads, None, None]
    wanted = [g if n else None for g, n in zip(grads, ctx.needs_input_grad[:5], strict=True)]
    return *wanted, None, None


forward.register_autograd(_gradient, setup_context=_setup)
