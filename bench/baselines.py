"""What the ops and models are measured against. Each form is tested like an op of our own.

A form that this machine cannot run is listed with the reason (`available`), never left out.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from measure import out_of_memory
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[..., torch.Tensor]


# HyperAttention as its authors published it


def hashes(tensor: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Bucket `[B, H, L]` of each row of `tensor` `[B, H, L, D]`: the signs of its projections on
    the r `directions` `[D, r]` as a number c, and of that the code c ^ (c >> 1).

    The authors call this order "unit Hamming". It would be one if the code were undone: of the 127
    pairs of neighbours at r = 7, 31 differ in two to four signs.
    """
    signs = tensor @ directions > 0
    code = (signs * 2 ** torch.arange(directions.shape[1], device=tensor.device)).sum(-1)
    return code ^ (code >> 1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention and its log-sum-exp `[.., L, 1]`; `mask` is True where a key is not seen."""
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    return scores.softmax(-1) @ value, lse


def merge(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from attention over each."""
    lse = torch.logaddexp(one[1], other[1])
    return one[0] * (one[1] - lse).exp() + other[0] * (other[1] - lse).exp(), lse


def published_hyper_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    lsh_num_projs: int = 7,
    block_size: int = 256,
    sample_size: int = 256,
    min_seq_len: int = 4096,
    mask_own_block: bool = False,
    seed: int = 0,
) -> torch.Tensor:
    """HyperAttention (Han et al. 2023, arXiv 2310.05869), the algorithm of the released code.

    Queries and keys are ordered by bucket, each set on its own and stably. Block i of the ordered
    queries attends exactly to block i of the ordered keys. All queries attend to `sample_size`
    keys, drawn uniformly with replacement, each of which stands for L / sample_size keys. The two
    parts are merged by their log-sum-exps. A causal call halves the sequence until a half is no
    longer than `min_seq_len`; the second half attends to the first as above.

    mask_own_block: the paper leaves a sampled key out where it lies in the query's own block. The
        released code does so in none of its fp32 and CUDA paths, which is the default here.
    seed: of projections and samples; the released code takes them from the global generator.

    query, key, value: `[B, H, L, D]`. Below `min_seq_len` queries attention is exact. What released
    code gets wrong besides is not repeated: its log-sum-exp saturates, its gradients drop the
    merge, and zero padding is attended to. So lengths must be such that nothing is padded.
    Raises ValueError if a length is no multiple of the block (causal: does not halve evenly).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    generator = torch.Generator(query.device).manual_seed(seed)
    directions = torch.randn(
        query.shape[-1], lsh_num_projs, generator=generator, device=query.device
    ).to(query.dtype)

    def across(query, key, value):
        heads, length, keys = query.shape[:2], query.shape[2], key.shape[2]
        if length < min_seq_len:
            return attend(query, key, value, scale)
        if keys % block_size or length % (keys // block_size):
            raise ValueError(
                "published_hyper_attention: lengths must be multiples of block_size = "
                f"{block_size}, got {length} queries and {keys} keys."
            )
        query_order = hashes(query, directions).argsort(dim=-1, stable=True)
        key_order = hashes(key, directions).argsort(dim=-1, stable=True)
        query, key, value = (
            tensor.gather(2, order[..., None].expand_as(tensor))
            for tensor, order in ((query, query_order), (key, key_order), (value, key_order))
        )
        blocks = keys // block_size
        out = attend(*(t.unflatten(2, (blocks, -1)) for t in (query, key, value)), scale)
        out = out[0].flatten(2, 3), out[1].flatten(2, 3)
        if sample_size and keys > max(block_size, sample_size):
            size = (*heads, sample_size)
            sampled = torch.randint(keys, size, generator=generator, device=query.device)
            rows = sampled[..., None].expand(*size, key.shape[-1])
            mask = None
            if mask_own_block:
                own = torch.arange(length, device=query.device) // (length // blocks)
                mask = own[:, None] == sampled[:, :, None] // block_size
            rest, lse = attend(query, key.gather(2, rows), value.gather(2, rows), scale, mask)
            if mask is not None:
                # Every sampled key in the query's own block: nothing is left of this part.
                rest = rest.masked_fill(lse == -torch.inf, 0)
            out = merge(out, (rest, lse + math.log(keys / sample_size)))
        back = query_order.argsort(dim=-1)[..., None]
        return tuple(t.gather(2, back.expand(-1, -1, -1, t.shape[-1])) for t in out)

    def causal(query, key, value):
        length = query.shape[2]
        if length <= min_seq_len:
            later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
            return attend(query, key, value, scale, later)
        if length % 2:
            raise ValueError(
                f"published_hyper_attention: a causal length must halve evenly, got {length}."
            )
        half = length // 2
        # Both halves at once, as heads side by side.
        halves = (torch.cat(t.split(half, dim=2), dim=1) for t in (query, key, value))
        both = causal(*halves)
        (first, second), (first_lse, second_lse) = (t.chunk(2, dim=1) for t in both)
        past = across(query[:, :, half:], key[:, :, :half], value[:, :, :half])
        second, second_lse = merge((second, second_lse), past)
        return torch.cat([first, second], 2), torch.cat([first_lse, second_lse], 2)

    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            "published_hyper_attention: a causal call needs as many queries as keys, got "
            f"{query.shape[2]} and {key.shape[2]}."
        )
    return (causal if is_causal else across)(query, key, value)[0]


# Exact attention, `[B, H, L, D]`


def _sdpa(backend, query, key, value, *, is_causal=False):
    with sdpa_kernel(backend):
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(query, key, value, *, is_causal=False):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = None
    if is_causal:
        mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, query.shape[2], key.shape[2], str(query.device)
        )
    return _compiled_flex()(query, key, value, block_mask=mask)


def _flash_attn(query, key, value, *, is_causal=False):
    flash = importlib.import_module("flash_attn").flash_attn_func
    return flash(*(t.transpose(1, 2) for t in (query, key, value)), causal=is_causal).transpose(
        1, 2
    )


EXACT_ATTENTION: dict[str, Attention] = {
    "sdpa": nn.functional.scaled_dot_product_attention,
    "sdpa math": partial(_sdpa, SDPBackend.MATH),
    "sdpa flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "flex_attention": _flex,
    "flash-attn": _flash_attn,
}


def mamba_ssm_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, **options
):
    """mamba_ssm's CUDA scan, where it is installed; it takes no initial state."""
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **options)


def available(
    forms: Mapping[str, Callable[..., Any]], *example: Any, **options: Any
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """(forms that run on `example`, name -> why not for the others).

    One that runs out of memory is no less there: `measure.compare` notes where.
    """
    run, absent = {}, {}
    for name, form in forms.items():
        try:
            form(*example, **options)
        # Whatever a library raises on this machine is the reason.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            if out_of_memory(error):
                run[name] = form
            elif reason.startswith("No viable backend"):
                absent[name] = "PyTorch has no such backend for these inputs on this machine"
            else:
                absent[name] = reason
        else:
            run[name] = form
    return run, absent


# Swin over the whole image


def whole_image_swin(region_encoder: Any, side: int, *, grow_window: bool) -> nn.Module:
    """The timm SwinV2 of `region_encoder` on whole images of side x side px, with its weights.

    grow_window: the window is side / 16, as in the paper; otherwise it stays as it was.
    SwinV2's parameters do not depend on image or window: only tables of coordinates are made anew.
    """
    import timm

    model = timm.create_model(
        region_encoder.name,
        features_only=True,
        in_chans=region_encoder.in_chans,
        img_size=side,
        **({"window_size": side // 16} if grow_window else {}),
    )
    model.load_state_dict(region_encoder.model.state_dict())
    return model.eval()
