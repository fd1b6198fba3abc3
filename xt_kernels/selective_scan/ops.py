"""`selective_scan` as custom ops: one schema for CPU and CUDA, opaque to torch.compile.

`forward` is differentiable and `backward` is its gradient; a second derivative does not exist, and
asking for it raises. Triton is imported where a CUDA tensor arrives.
"""

from __future__ import annotations

import torch

from . import eager

# Tokens from one kept state to the next on CUDA.
CHUNK = 64


def _chunk(u: torch.Tensor, A: torch.Tensor) -> int:
    return CHUNK if u.is_cuda else eager.chunk_length(A.numel())


@torch.library.custom_op("xt::selective_scan_fwd", mutates_args=())
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out `[B, D, L]`, last state `[B, D, N]`, states `[B, chunks, N, D]` for the backward).

    B, C: `[B, G, N, L]`. keep_states: without it there are no chunks in states, and no backward.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if not u.is_cuda:
        with torch.autocast("cpu", enabled=False):
            return eager.forward(*inputs, delta_softplus, keep_states, _chunk(u, A))
    from . import kernels

    with torch.cuda.device(u.device):
        return kernels.launch_forward(*inputs, delta_softplus, keep_states, _chunk(u, A))


@forward.register_fake
def _(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, dim, length = u.shape
    chunks = -(-length // _chunk(u, A)) if keep_states else 0
    last_state = A.new_empty(batch, dim, A.shape[1])
    return torch.empty_like(u), last_state, A.new_empty(batch, chunks, A.shape[1], dim)


@torch.library.custom_op("xt::selective_scan_bwd", mutates_args=())
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
) -> list[torch.Tensor]:
    """Gradients of u, delta, A, B, C, and of D, z, delta_bias, initial_state where given."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, states, grad_out, grad_last_state)
    if not u.is_cuda:
        with torch.autocast("cpu", enabled=False):
            return eager.backward(*inputs, delta_softplus, _chunk(u, A))
    from . import kernels

    with torch.cuda.device(u.device):
        return kernels.launch_backward(*inputs, delta_softplus, _chunk(u, A))


@backward.register_fake
def _(
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
) -> list[torch.Tensor]:
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [t.new_empty(t.shape) for t in inputs if t is not None]


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.delta_softplus, _ = inputs
    states = output[2]
    ctx.save_for_backward(*tensors, states)
    ctx.mark_non_differentiable(states)
    # None tells that the last state is in no loss.
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_out, grad_last_state, _):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    *inputs, _ = tensors
    if grad_out is None:
        grad_out = torch.zeros_like(inputs[0])
    found = iter(backward(*tensors, grad_out, grad_last_state, ctx.delta_softplus))
    grads = [None if t is None else next(found) for t in inputs]
    wanted = [g if n else None for g, n in zip(grads, ctx.needs_input_grad[:9], strict=True)]
    return *wanted, None, None


forward.register_autograd(_gradient, setup_context=_setup)
