"""Mamba as context encoder: a state goes in and comes out, so chunks equal the whole sequence.

The mixer has the parameters of `mamba_ssm.Mamba` (Gu and Dao 2023, arXiv 2312.00752, figure 3):

    x, z = in_proj(tokens)             x = silu(causal_conv(x))
    delta, B, C = x_proj(x)            y = selective_scan(x, dt_proj(delta), A, B, C, D, z)
    out = out_proj(y)                  A = -exp(A_log)

What a chunk leaves for the next one is the scan's last state and the convolution's last inputs.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xt_kernels import selective_scan
from xt_kernels.causal_conv import causal_conv

from .context_encoder import GRADIENTS, Memory

FORMS = ("residual", "released")


class MambaMixer(nn.Module):
    """Selective state space mixer; a state dict of `mamba_ssm.Mamba` loads, and the other way.

    d_model: width of the tokens. d_state: states N a channel, up to 64. d_conv: width of the
    convolution. expand: d_inner / d_model. dt_rank: "auto" is d_model / 16, rounded up.
    dt_min, dt_max, dt_init_floor: range of the first step sizes. bias, conv_bias: of the
    projections and of the convolution. backend: of `xt_kernels.selective_scan`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        backend: str = "xt",
    ) -> None:
        super().__init__()
        for name, value in (("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if value < 1:
                raise ValueError(f"MambaMixer: {name} must be at least 1, got {value}.")
        inner = expand * d_model
        rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.backend = backend
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
            low, high = math.log(dt_min), math.log(dt_max)
            step = torch.empty(inner).uniform_(low, high).exp().clamp(min=dt_init_floor)
            # What softplus takes to `step`.
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    @property
    def state_shape(self) -> tuple[int, int]:
        """[d_inner, N + d_conv - 1] of the state of one batch item."""
        inner, states = self.A_log.shape
        return inner, states + self.conv1d.kernel_size[0] - 1

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(mixed `[B, L, C]`, state) of tokens `[B, L, C]` behind `state`.

        state: `[B, d_inner, N + d_conv - 1]`, fp32 (fp64 for fp64): the scan's state, then the last
        inputs of the convolution; None at the start of a sequence.
        """
        rank, states = self.dt_proj.in_features, self.A_log.shape[1]
        scanned = inputs = None
        if state is not None:
            scanned, inputs = state[..., :states], state[..., states:]
        # [B, channels, L], tokens contiguous, as the scan likes them.
        projected = self.in_proj.weight @ tokens.mT
        if self.in_proj.bias is not None:
            projected = projected + self.in_proj.bias[:, None].to(projected.dtype)
        x, z = projected.chunk(2, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, inputs = causal_conv(x, self.conv1d.weight[:, 0], self.conv1d.bias, inputs, silu=True)
        selected = self.x_proj.weight @ x
        delta, B, C = selected[:, :rank], selected[:, rank:-states], selected[:, -states:]
        found = selective_scan(
            x,
            self.dt_proj.weight @ delta,
            -self.A_log.to(wide).exp(),
            B,
            C,
            self.D.to(wide),
            z,
            self.dt_proj.bias.to(wide),
            delta_softplus=True,
            return_last_state=True,
            initial_state=scanned,
            backend=self.backend,
        )
        y, scanned = found
        return self.out_proj(y.mT), torch.cat([scanned, inputs.to(wide)], -1)


class MambaLayer(nn.Module):
    """Norm and mixer: RMSNorm and `x + mixer(norm(x))`, or in the released form LayerNorm and
    `norm(x) + mixer(norm(x))`.

    reverse: from the last token to the first.
    """

    def __init__(self, mixer: MambaMixer, form: str, reverse: bool) -> None:
        super().__init__()
        norm = nn.LayerNorm if form == "released" else nn.RMSNorm
        self.norm = norm(mixer.in_proj.in_features, eps=1e-5)
        self.mixer = mixer
        self.form, self.reverse = form, reverse

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.norm(x)
        mixed, state = self.mixer(normed.flip(1) if self.reverse else normed, state)
        mixed = mixed.flip(1) if self.reverse else mixed
        return (normed if self.form == "released" else x) + mixed, state


class MambaContextEncoder(nn.Module):
    """Mamba layers with carried state: `tokens, memory = encoder(tokens, memory)`.

    dim: token width. depth: layers. d_state, d_conv, expand, backend: as in `MambaMixer`.
    form: "residual", x + mixer(norm(x)), all layers from the first token to the last; "released",
        the layers of the paper's released model: norm(x) + mixer(norm(x)), layers 0, 2, ... on the
        reversed sequence, which only works on a whole sequence.
    carry: return a state for the next chunk; without it every chunk stands alone.
    gradient, gradient_chunks: as in `ContextEncoder`: "stop", "through" or "truncated".

    A sequence in chunks of any lengths gives what one call gives, to rounding.
    State dict: `layers.<i>.norm.weight` (and `.bias` in the released form),
    `layers.<i>.mixer.<names of mamba_ssm.Mamba>`.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 4,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        form: str = "residual",
        carry: bool = True,
        gradient: str = "stop",
        gradient_chunks: int = 4,
        backend: str = "xt",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for option, value, known in (("form", form, FORMS), ("gradient", gradient, GRADIENTS)):
            if value not in known:
                raise ValueError(
                    f"{name}: {option} must be one of {', '.join(known)}, got {value!r}."
                )
        for option, number in (("depth", depth), ("gradient_chunks", gradient_chunks)):
            if number < 1:
                raise ValueError(f"{name}: {option} must be at least 1, got {number}.")
        if form == "released" and carry:
            raise ValueError(
                f"{name}: carry must be False with form 'released': its reversed layers start at "
                f"the last token of the whole sequence, which one pass over chunks has not seen "
                f"yet. Give the whole sequence in one call, or choose form 'residual', got True."
            )
        self.dim, self.form, self.carry = dim, form, carry
        self.gradient, self.gradient_chunks = gradient, gradient_chunks
        self.layers = nn.ModuleList(
            MambaLayer(
                MambaMixer(dim, d_state, d_conv, expand, backend=backend),
                form,
                form == "released" and i % 2 == 0,
            )
            for i in range(depth)
        )

    @property
    def memory_chunks(self) -> int:
        """1 if a state is carried, else 0."""
        return int(self.carry)

    @property
    def reach(self) -> int:
        """How many chunks back a token can see: all, or none without `carry`."""
        return sys.maxsize if self.carry else 0

    def forward(
        self, tokens: torch.Tensor, memory: Memory | None = None
    ) -> tuple[torch.Tensor, Memory | None]:
        """tokens: `[B, L, C]` of this chunk. memory: what the call before returned, None at first.

        Returns the tokens and the memory for the next chunk (None without carry): `states`
        `[depth, B, d_inner, N + d_conv - 1]`, fp32 (fp64 for fp64), whatever the lengths were.
        Raises ValueError if the memory has another depth, batch, width, dtype or device.
        """
        if tokens.dim() != 3 or tokens.shape[2] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: tokens must be [B, L, C] = [*, *, {self.dim}], "
                f"got {list(tokens.shape)}."
            )
        seen = 0
        if memory is not None:
            self._check_memory(tokens, memory)
            seen = memory.seen
            is_cut = self.gradient == "truncated" and seen % self.gradient_chunks == 0
            if self.gradient == "stop" or is_cut:
                memory = memory.detach()
        states = None if memory is None else memory.states
        if torch.is_grad_enabled() and self.carry and self.gradient != "stop":
            tokens, new = checkpoint(
                self._mix, tokens, states, use_reentrant=False, preserve_rng_state=False
            )
        else:
            tokens, new = self._mix(tokens, states)
        if not self.carry:
            return tokens, None
        return tokens, Memory(new.detach() if self.gradient == "stop" else new, (), seen + 1)

    def _mix(
        self, tokens: torch.Tensor, states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = []
        for i, layer in enumerate(self.layers):
            tokens, state = layer(tokens, None if states is None else states[i])
            new.append(state)
        return tokens, torch.stack(new)

    def _check_memory(self, tokens: torch.Tensor, memory: Memory) -> None:
        def fail(rule: str, got: object) -> None:
            raise ValueError(f"{type(self).__name__}: memory must {rule}, got {got}.")

        if not isinstance(memory, Memory):
            fail("be a Memory, as an earlier call returned it, or None", type(memory).__name__)
        if not self.carry:
            fail("be None without carry", "a Memory")
        first = self.layers[0]
        assert isinstance(first, MambaLayer)
        expected = [len(self.layers), tokens.shape[0], *first.mixer.state_shape]
        if list(memory.states.shape) != expected:
            layout = "[depth, B, d_inner, N + d_conv - 1]"
            fail(f"hold Mamba states {layout} = {expected}", list(memory.states.shape))
        wide = torch.promote_types(tokens.dtype, torch.float32)
        if memory.states.dtype != wide or memory.states.device != tokens.device:
            fail(
                f"be {wide} on the device of tokens, {tokens.device}",
                f"{memory.states.dtype} on {memory.states.device}",
            )
