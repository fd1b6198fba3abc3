"""A timm backbone seen as regions `[R, C, s, s]` -> last feature map `[R, t, t, D]`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from torch import nn


class RegionEncoder(nn.Module):
    """Any timm model with `features_only`, one output layout whatever the backbone returns.

    name: timm model name, such as "swinv2_tiny_window16_256", "hiera_base_224", "convnext_tiny".
    region: side of the square regions, pixels.
    in_chans: bands of the image.
    pretrained: load timm's weights (downloads them unless they are in the local hub cache).

    Attributes: `num_features` (D), `stride` (pixels a token), `channels` and `strides` of all
    stages.
    Raises ValueError for an unknown name or a region side that the backbone cannot take,
    and ConnectionError if pretrained weights cannot be had.
    """

    def __init__(
        self, name: str, *, region: int = 256, in_chans: int = 3, pretrained: bool = False
    ) -> None:
        super().__init__()
        self.name, self.region, self.in_chans = name, region, in_chans
        self.model = _create(name, region, in_chans, pretrained)
        self.channels: list[int] = self.model.feature_info.channels()
        self.strides: list[int] = self.model.feature_info.reduction()
        self.num_features, self.stride = self.channels[-1], self.strides[-1]
        self._nhwc = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        if region % self.stride:
            raise ValueError(
                f"RegionEncoder: region must be a multiple of the stride {self.stride} of {name}, "
                f"got {region}."
            )

    def forward_stages(self, regions: torch.Tensor) -> list[torch.Tensor]:
        """Maps of all stages, `[R, s / stride_i, s / stride_i, C_i]`, un-normed as in timm."""
        maps: list[torch.Tensor] = self.model(regions)
        return maps if self._nhwc else [m.permute(0, 2, 3, 1) for m in maps]

    def forward(self, regions: torch.Tensor) -> torch.Tensor:
        """regions: `[R, C, s, s]`, normalised. Returns the last stage's map, `[R, t, t, D]`."""
        return self.forward_stages(regions)[-1]


def _create(name: str, region: int, in_chans: int, pretrained: bool) -> Any:
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        hint = f" Near it: {near}." if near else ""
        raise ValueError(f"RegionEncoder: name must be a timm model, got {name!r}.{hint}")

    def build(**extra: Any) -> Any:
        return timm.create_model(
            name, pretrained=pretrained, features_only=True, in_chans=in_chans, **extra
        )

    # Models with position tables (SwinV2, Hiera) must be told the side; the others refuse the word.
    try:
        with _offline_hub() if pretrained and not _hub_is_reachable() else nullcontext():
            try:
                return build(img_size=region)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                return build()
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"RegionEncoder: region must be a side that {name} can take, got {region} ({error})."
        ) from error
    except (RuntimeError, OSError) as error:
        if not pretrained:
            raise
        raise ConnectionError(
            f"Pretrained weights of {name!r} could not be loaded: they are not in the local hub "
            f"cache and could not be downloaded ({type(error).__name__}). Connect to the network "
            f"once, or use random weights."
        ) from error


def _hub_is_reachable() -> bool:
    """One connection attempt of at most 5 s; the hub client itself retries for three quarters of a
    minute. Behind a proxy only the client can tell."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    url = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def _offline_hub() -> Iterator[None]:
    """The hub client reads its local cache only."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
