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
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xt_kernels import selective_scan
from xt_kernels.causal_conv import causal_conv
from xt_kernels.selective_scan.api import BACKENDS, MAX_STATES

from .context_encoder import GRADIENTS, Memory

FORMS = ("residual", "released")
DT_INITS = ("random", "constant")


class MambaMixer(nn.Module):
    """Selective state space mixer; a state dict of `mamba_ssm.Mamba` loads, and the other way.

    d_model: width of the tokens. d_state: states N a channel, up to 64. d_conv: width of the
    convolution. expand: d_inner / d_model. dt_rank: "auto" is d_model / 16, rounded up.
    dt_min, dt_max, dt_init_floor: range of the first step sizes. dt_init, dt_scale: dt_proj's first
    weights, "random" up to dt_scale dt_rank^-1/2, or all of them that ("constant"). bias,
    conv_bias: of the projections and of the convolution. use_fast_path, layer_idx: taken as
    mamba_ssm's callers give them, without effect. device, dtype: of the parameters; A_log and D are
    at least fp32. backend: of `xt_kernels.selective_scan`; "mamba_ssm" takes no state, and its last
    one has no gradient.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "xt",
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        for ok, name, rule, value in (
            (1 <= d_state <= MAX_STATES, "d_state", f"be 1 to {MAX_STATES}", d_state),
            (d_conv >= 1, "d_conv", "be at least 1", d_conv),
            (inner >= 1, "expand", "make d_inner = expand d_model at least 1", expand),
            (
                isinstance(rank, int) and rank >= 1,
                "dt_rank",
                'be "auto" or an integer of at least 1',
                repr(dt_rank),
            ),
            (dt_init in DT_INITS, "dt_init", f"be one of {', '.join(DT_INITS)}", repr(dt_init)),
            (backend in BACKENDS, "backend", f"be one of {', '.join(BACKENDS)}", repr(backend)),
        ):
            if not ok:
                raise ValueError(f"MambaMixer: {name} must {rule}, got {value}.")
        assert isinstance(rank, int)
        self.backend = backend
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **like)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias, **like)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, **like)
        self.dt_proj = nn.Linear(rank, inner, **like)
        wide = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        rates = torch.arange(1, d_state + 1, device=device, dtype=wide)
        self.A_log = nn.Parameter(rates.log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner, device=device, dtype=wide))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **like)
        with torch.no_grad():
            most = dt_scale * rank**-0.5
            nn.init.uniform_(self.dt_proj.weight, -most if dt_init == "random" else most, most)
            low, high = math.log(dt_min), math.log(dt_max)
            step = torch.empty(inner, device=device, dtype=wide).uniform_(low, high).exp()
            step = step.clamp(min=dt_init_floor)
            # What softplus takes to `step`.
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    @property
    def state_sizes(self) -> tuple[int, int]:
        """(N of the scan, d_conv - 1 inputs of the convolution) of one channel's state."""
        return self.A_log.shape[1], self.conv1d.kernel_size[0] - 1

    @property
    def state_shape(self) -> tuple[int, int]:
        """[d_inner, N + d_conv - 1] of the state of one batch item."""
        return self.A_log.shape[0], sum(self.state_sizes)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(mixed `[B, L, C]`, state) of tokens `[B, L, C]` behind `state`.

        state: `[B, d_inner, N + d_conv - 1]`, fp32 (fp64 for fp64): the scan's state, then the last
        inputs of the convolution; None at the start of a sequence.
        Raises ValueError if tokens or state have another shape, dtype or device.
        """
        self._check(tokens, state)
        rank, states = self.dt_proj.in_features, self.A_log.shape[1]
        scanned = inputs = None
        if state is not None:
            scanned, inputs = state[..., :states], state[..., states:]
        x, z = _project(self.in_proj.weight, tokens.mT, self.in_proj.bias).chunk(2, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, inputs = causal_conv(x, self.conv1d.weight[:, 0], self.conv1d.bias, inputs, silu=True)
        selected = _project(self.x_proj.weight, x)
        delta, B, C = selected[:, :rank], selected[:, rank:-states], selected[:, -states:]
        y, scanned = selective_scan(
            x,
            _project(self.dt_proj.weight, delta),
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
        mixed = _project(self.out_proj.weight, y, self.out_proj.bias).mT
        return mixed, torch.cat([scanned, inputs.to(wide)], -1)

    def _check(self, tokens: torch.Tensor, state: torch.Tensor | None) -> None:
        def check(ok: bool, name: str, rule: str, got: object) -> None:
            if not ok:
                raise ValueError(f"MambaMixer: {name} must {rule}, got {got}.")

        width = self.in_proj.in_features
        shape = list(tokens.shape)
        rule = f"be [B, L, C] = [*, *, {width}]"
        check(len(shape) == 3 and shape[2] == width, "tokens", rule, shape)
        if state is None:
            return
        check(self.backend == "xt", "state", f"be None with backend {self.backend!r}", "a tensor")
        expected = [shape[0], *self.state_shape]
        rule = f"be [B, d_inner, N + d_conv - 1] = {expected}"
        check(list(state.shape) == expected, "state", rule, list(state.shape))
        wide = torch.promote_types(tokens.dtype, torch.float32)
        check(
            state.dtype == wide and state.device == tokens.device,
            "state",
            f"be {wide} on the device of tokens, {tokens.device}",
            f"{state.dtype} on {state.device}",
        )


def _project(
    weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """weight @ x + bias of x `[B, in, L]`: tokens stay contiguous, as the scan likes them.

    So they are in the result and in the gradient of x, without a copy. `weight @ x` would copy both
    to make one product of the batch while gradients are recorded; `F.linear` gives and takes
    channels last.
    """
    weight = weight.expand(len(x), -1, -1)
    return weight.bmm(x) if bias is None else torch.baddbmm(bias[:, None], weight, x)


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
        expand: float = 2,
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
        if backend == "mamba_ssm" and carry:
            raise ValueError(
                f"{name}: carry must be False with backend 'mamba_ssm', whose scan takes no state, "
                f"got True."
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
        `[depth, B, d_inner, N + d_conv - 1]`, fp32 (fp64 for fp64), `lengths` (N, d_conv - 1).
        Raises ValueError if the memory is of another model, batch, dtype or device.
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
        if self.gradient == "stop":
            new = new.detach()
        return tokens, Memory(new, self._mixer.state_sizes, seen + 1)

    @property
    def _mixer(self) -> MambaMixer:
        """The first of the layers' mixers, which are alike."""
        first = self.layers[0]
        assert isinstance(first, MambaLayer)
        return first.mixer

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
        expected = [len(self.layers), tokens.shape[0], *self._mixer.state_shape]
        sizes = self._mixer.state_sizes
        if list(memory.states.shape) != expected or memory.lengths != sizes:
            layout = "[depth, B, d_inner, N + d_conv - 1]"
            fail(
                f"hold Mamba states {layout} = {expected} of lengths (N, d_conv - 1) = {sizes}",
                f"{list(memory.states.shape)} of lengths {memory.lengths}",
            )
        wide = torch.promote_types(tokens.dtype, torch.float32)
        if memory.states.dtype != wide or memory.states.device != tokens.device:
            fail(
                f"be {wide} on the device of tokens, {tokens.device}",
                f"{memory.states.dtype} on {memory.states.device}",
            )
