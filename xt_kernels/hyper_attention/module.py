"""`HyperAttention`: the authors' module over `hyper_attention`."""

from __future__ import annotations

import warnings

import torch

from .. import _checks as checks
from . import plan as plans
from .api import RESIDUALS, WINDOWS, hyper_attention, make_plan

_OP = "HyperAttention"
LAYOUTS = ("bhnd", "bnhd")


class HyperAttention(torch.nn.Module):
    """Drop-in for the authors' `HyperAttention` (Han et al. 2023, arXiv 2310.05869).

    input_dim: head dim D of query and key. lsh_num_projs, block_size, sample_size, min_seq_len: as
        `hyper_attention` has them.
    cuda: accepted and ignored, with a DeprecationWarning: the tensors say where to run.
    window, residual: as `hyper_attention` has them. The authors' estimator has uniform samples
        (residual="uniform"); docs/hyper_attention.md says what errs least where.
    layout: "bhnd" for `[B, heads, L, D]`, "bnhd" for `[B, L, heads, D]`.
    resample: in training, draw new samples in each call, from PyTorch's generator; a recomputation
        under activation checkpointing draws the same. Evaluation always takes those of the seed. A
        CUDA graph of a training step needs resample=False: new samples are drawn on the host.
    seed: of hyperplanes and samples.

    The hyperplanes `[D, lsh_num_projs]` are a buffer, so a reloaded model gives the same output.
    """

    projections: torch.Tensor

    def __init__(
        self,
        input_dim: int = 64,
        lsh_num_projs: int = 7,
        block_size: int = 256,
        sample_size: int = 256,
        min_seq_len: int = 4096,
        cuda: object = None,
        *,
        window: str = "lsh",
        residual: str = "sample",
        layout: str = "bhnd",
        resample: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if cuda is not None:
            message = "HyperAttention: cuda is ignored; the tensors say where to run."
            warnings.warn(message, DeprecationWarning, stacklevel=2)
        if not 16 <= input_dim <= 256 or input_dim % 8:
            checks.fail(_OP, "input_dim", "be a multiple of 8 in 16..256", input_dim)
        for name, count, most in (
            ("lsh_num_projs", lsh_num_projs, plans.MAX_PROJECTIONS),
            ("block_size", block_size, None),
            ("sample_size", sample_size, None),
        ):
            checks.check_count(_OP, name, count, 1, most)
        checks.check_count(_OP, "min_seq_len", min_seq_len, 0)
        for name, value, known in (
            ("window", window, WINDOWS),
            ("residual", residual, RESIDUALS),
            ("layout", layout, LAYOUTS),
        ):
            if value not in known:
                checks.fail(_OP, name, f"be one of {', '.join(known)}", repr(value))
        self.input_dim, self.lsh_num_projs = input_dim, lsh_num_projs
        self.block_size, self.sample_size, self.min_seq_len = block_size, sample_size, min_seq_len
        self.window, self.residual, self.layout = window, residual, layout
        self.resample, self.seed = resample, seed
        drawn = plans.random_projections(input_dim, lsh_num_projs, seed, torch.device("cpu"))
        self.register_buffer("projections", drawn[0].to(torch.get_default_device(), copy=True))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None = None,
        causal: bool = False,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention as `hyper_attention` computes it; lse, if asked for, is `[B, heads, L, 1]`.

        query `[B, heads, L, D]`, key and value `[B, groups, Lk, D]`, groups a divisor of heads (or
        with layout="bnhd" heads third). Raises ValueError if arguments disagree.
        """
        checks.check_dim(_OP, "query", query, {4: "[B, heads, L, D]"})
        if query.shape[3] != self.input_dim:
            checks.fail(_OP, "query", f"have head dim input_dim = {self.input_dim}", query.shape[3])
        if self.layout == "bnhd":
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if query.shape[1] > max(query.shape[2], 64):
            layout, other = (
                ("[B, heads, L, D]", "bhnd")
                if self.layout == "bnhd"
                else ("[B, L, heads, D]", "bnhd")
            )
            message = (
                f"HyperAttention: query has {query.shape[1]} heads and {query.shape[2]} tokens; "
                f'for {layout} give layout="{other}".'
            )
            warnings.warn(message, stacklevel=2)
        draw = None
        if self.training and self.resample and self.residual in ("sample", "uniform"):
            draw = torch.randint(2**31, (), device="cpu")
        plan = make_plan(
            query,
            key,
            is_causal=causal,
            enable_gqa=True,
            block_size=self.block_size,
            sample_size=self.sample_size,
            min_seq_len=self.min_seq_len,
            window=self.window,
            residual=self.residual,
            projections=self.projections,
            seed=self.seed,
            draw=draw,
        )
        out, lse = hyper_attention(
            query, key, value, scale=scale, enable_gqa=True, plan=plan, return_lse=True
        )
        out = out.transpose(1, 2) if self.layout == "bnhd" else out
        return (out, lse[..., None]) if return_lse else out

    def extra_repr(self) -> str:
        """What tells one instance from another."""
        return (
            f"input_dim={self.input_dim}, lsh_num_projs={self.lsh_num_projs}, "
            f"block_size={self.block_size}, sample_size={self.sample_size}, "
            f"min_seq_len={self.min_seq_len}, window={self.window!r}, residual={self.residual!r}"
        )
