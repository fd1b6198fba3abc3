"""`hyper_attention` as custom ops: one schema for CPU and CUDA, opaque to torch.compile.

`make_choices` makes a plan's tensors, `forward` is differentiable for a fixed plan, and `backward`
is its gradient; a second derivative does not exist, and asking for it raises. Triton is imported
where a CUDA tensor arrives. The scalars from `is_causal` on are the fields of a `Spec`.
"""

from __future__ import annotations

from typing import Any

import torch

from . import eager
from .plan import QUERY_BLOCK, Choices, Spec, eager_choices, hyper_levels, random_projections


@torch.library.custom_op("xt::hyper_attention_plan", mutates_args=())
def make_choices(
    query: torch.Tensor,
    key: torch.Tensor,
    memory_key: torch.Tensor | None,
    projections: torch.Tensor | None,
    lsh_num_projs: int,
    seed: int,
    draw: torch.Tensor | None,
    is_causal: bool,
    block_size: int,
    sample_size: int,
    min_seq_len: int,
    window: str,
    residual: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of a `Choices`.

    projections `[1 or groups, D, bits]`, fp32, stand for those of the seed; draw, an int64 scalar
    on the CPU, for the seed of samples.
    """
    spec = Spec(is_causal, block_size, sample_size, min_seq_len, window, residual)
    if projections is None:
        projections = random_projections(key.shape[3], lsh_num_projs, seed, key.device)
    projections = projections.expand(key.shape[1], -1, -1)
    seed = seed if draw is None else int(draw)
    inputs = (spec, query, key, memory_key, projections, seed)
    if not query.is_cuda:
        # Autocast reaches PyTorch's own ops in here; hashes are fp32.
        with torch.autocast("cpu", enabled=False):
            return eager_choices(*inputs)
    from . import order

    with torch.cuda.device(query.device):
        return order.launch_choices(*inputs)


@make_choices.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    memory_key: torch.Tensor | None,
    projections: torch.Tensor | None,
    lsh_num_projs: int,
    seed: int,
    draw: torch.Tensor | None,
    *scalars: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    spec = Spec(*scalars)
    (batch, heads, num_queries, _), (groups, num_keys) = query.shape, key.shape[1:3]
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    if spec.is_causal:
        queries = keys = blocks = residuals = 0
        # The levels depend on every length: a graph with dynamic sizes is bound to these.
        for level in hyper_levels(spec, int(num_queries), int(num_keys), int(num_memory)):
            queries += level.segments * level.num_queries
            keys += level.segments * level.num_keys
            blocks += level.segments * level.num_blocks
            residuals += level.segments * level.num_residual
    else:
        queries, keys, residuals = num_queries, num_memory + num_keys, spec.sample_size
        blocks = (num_queries + QUERY_BLOCK - 1) // QUERY_BLOCK
    if not spec.is_ordered:
        queries = keys = 0
    if spec.residual not in ("sample", "uniform"):
        residuals = 0
    shapes = [
        (batch, heads, queries),
        (batch, groups, keys),
        (batch, heads, blocks),
        (residuals,),
        (batch, groups, residuals),
    ]
    made = [torch.empty(shape, dtype=torch.int32, device=query.device) for shape in shapes]
    return made[0], made[1], made[2], made[3], made[4]


@torch.library.custom_op("xt::hyper_attention_fwd", mutates_args=())
def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    choices: list[torch.Tensor],
    scale: float,
    is_causal: bool,
    block_size: int,
    sample_size: int,
    min_seq_len: int,
    window: str,
    residual: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[B, H, L, D]`, lse `[B, H, L]`); memory_key and memory_value come together."""
    spec = Spec(is_causal, block_size, sample_size, min_seq_len, window, residual)
    inputs = (query, key, value, memory_key, memory_value, Choices(*choices))
    if not query.is_cuda:
        return eager.forward(*inputs, spec, scale)
    from . import forward as kernels

    with torch.cuda.device(query.device):
        return kernels.launch_forward(*inputs, spec, scale)


@forward.register_fake
def _(query: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.custom_op("xt::hyper_attention_bwd", mutates_args=())
def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    choices: list[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    needs_memory: bool,
    scale: float,
    is_causal: bool,
    block_size: int,
    sample_size: int,
    min_seq_len: int,
    window: str,
    residual: str,
) -> list[torch.Tensor]:
    """Gradients of query, key and value; of memory_key and memory_value too if needs_memory."""
    spec = Spec(is_causal, block_size, sample_size, min_seq_len, window, residual)
    inputs = (query, key, value, memory_key, memory_value, Choices(*choices))
    results = (out, lse, grad_out, grad_lse)
    if not query.is_cuda:
        return eager.backward(*inputs, *results, spec, scale, needs_memory)
    from . import backward as kernels

    with torch.cuda.device(query.device):
        return kernels.launch_backward(*inputs, *results, spec, scale, needs_memory)


@backward.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    choices: list[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    needs_memory: bool,
    *scalars: Any,
) -> list[torch.Tensor]:
    inputs = [query, key, value]
    if needs_memory:
        assert memory_key is not None and memory_value is not None
        inputs += [memory_key, memory_value]
    return [torch.empty_like(t) for t in inputs]


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, memory_key, memory_value, choices, *ctx.scalars = inputs
    ctx.save_for_backward(query, key, value, memory_key, memory_value, *choices, *output)
    # None tells that lse is in no loss, which saves work.
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    *saved, out, lse = ctx.saved_tensors
    inputs, choices = saved[:5], saved[5:]
    needs_memory = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_lse is not None:
        grad_lse = grad_lse.to(lse.dtype)
    results = (out, lse, grad_out, grad_lse)
    grads = backward(*inputs, choices, *results, needs_memory, *ctx.scalars)
    grads = grads if needs_memory else [*grads, None, None]
    wanted = [g if n else None for g, n in zip(grads, ctx.needs_input_grad[:5], strict=True)]
    return *wanted, [None] * len(choices), *[None] * len(ctx.scalars)


forward.register_autograd(_gradient, setup_context=_setup)
