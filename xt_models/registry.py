"""Models by name: `create_model("xt_swinv2_tiny_256", context="xl")`."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

from .model import CONTEXTS, XT, XTConfig
from .region_encoder import RegionEncoder

ENCODERS = {
    "swinv2_tiny": ("swinv2_tiny_window16_256", 256),
    "swinv2_small": ("swinv2_small_window16_256", 256),
    "swinv2_base": ("swinv2_base_window16_256", 256),
    "swinv2_large": ("swinv2_large_window12to16_192to256", 256),
    "hiera_tiny": ("hiera_tiny_224", 224),
    "hiera_small": ("hiera_small_224", 224),
    "hiera_base": ("hiera_base_224", 224),
    "hiera_base_plus": ("hiera_base_plus_224", 224),
    "hiera_large": ("hiera_large_224", 224),
    "convnext_atto": ("convnext_atto", 256),
    "convnext_tiny": ("convnext_tiny", 256),
    "convnext_small": ("convnext_small", 256),
    "convnext_base": ("convnext_base", 256),
    "convnext_large": ("convnext_large", 256),
}
"""Short name -> timm name and its usual region side in pixels."""

CONTEXT_DEFAULTS: dict[str | None, dict[str, Any]] = {
    "xl": {"dim": 256, "depth": 4, "num_heads": 2, "residual": True},
    "hyper": {"causal": True, "chunk_regions": None, "pool": "token"},
    "mamba": {"depth": 4},
    "vit": {"chunk_regions": None, "pool": "token"},
    None: {},
}
"""What a context encoder sets unless the caller says otherwise: xl as in the paper's satellite
experiments, hyper as in the released classification models."""


class RandomWeightsWarning(UserWarning):
    """The model has random weights: its outputs are reproducible and mean nothing."""


def list_models() -> list[str]:
    """Names that `create_model` knows; another region side may stand in, `.xl` etc. may follow."""
    return [f"xt_{short}_{region}" for short, (_, region) in ENCODERS.items()]


def create_model(
    name: str = "xt_swinv2_tiny_256",
    *,
    context: str | None = "xl",
    pretrained: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> XT:
    """Builds a model, in evaluation mode.

    name: "xt_<encoder>_<region side>" (see `list_models`), ".<context>" may stand behind it; or
        any timm model name (its region side is then `region`, 256 by default).
    context: "xl", "hyper", "mamba", "vit" or None; a suffix of `name` wins.
    pretrained: load timm's weights into the region encoder. Context encoder and head stay random.
    seed: of the random weights; the global generators are left as they were.
    overrides: any field of `XTConfig`, such as num_classes, heads, in_chans, chunk_regions.

    Warns with RandomWeightsWarning unless pretrained. Raises ValueError for unknown names, values,
    and for a memory asked of Mamba, which has none of its own.
    """
    stem, _, suffix = name.partition(".")
    if suffix in CONTEXTS:
        name, context = stem, suffix
    if context not in CONTEXT_DEFAULTS:
        raise ValueError(
            f"create_model: context must be one of {', '.join(CONTEXTS)} or None, got {context!r}."
        )
    for field in ("memory", "memory_chunks"):
        if context == "mamba" and field in overrides:
            raise ValueError(
                f"create_model: {field} must be left out with context 'mamba', whose state stands "
                f"for all chunks before, got {overrides[field]!r}."
            )
    encoder, region = _find_encoder(name)
    defaults = dict(CONTEXT_DEFAULTS[context])
    if overrides.get("chunk_regions") is not None:
        defaults.pop("pool", None)  # a class token needs the whole image in one chunk
    config = XTConfig.from_dict(
        {"encoder": encoder, "region": region} | defaults | overrides | {"context": context}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = RegionEncoder(
            config.encoder, region=config.region, in_chans=config.in_chans, pretrained=pretrained
        )
        model = XT(config, region_encoder=backbone)
    if not pretrained:
        warnings.warn(
            f"{config.encoder}: random weights (seed {seed}); outputs are reproducible but mean "
            f"nothing until the model is trained or loaded.",
            RandomWeightsWarning,
            stacklevel=2,
        )
    return model.eval()


def _find_encoder(name: str) -> tuple[str, int]:
    match = re.fullmatch(r"xt_(.+)_(\d+)", name)
    if match and match[1] in ENCODERS:
        return ENCODERS[match[1]][0], int(match[2])
    if name in ENCODERS:
        return ENCODERS[name]
    if name.startswith("xt_"):
        raise ValueError(
            f"create_model: name must be one of {', '.join(list_models())}, or a timm model name, "
            f"got {name!r}."
        )
    return name, 256
