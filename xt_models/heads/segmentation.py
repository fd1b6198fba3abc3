"""Maps through a decoder of `segmentation_models_pytorch`, on earlier stages and context tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from xt_kernels._checks import fail

from .base import Trunk
from .dense import MapHead

DECODERS = ("unet", "fpn", "upernet")
UNET_CHANNELS = (256, 128, 64, 32, 16)


class SmpDecoder(nn.Module):
    """A decoder of `segmentation_models_pytorch` and its 1x1 or 3x3 head: maps `[N, K, ..]`.

    The region encoder's earlier stages are its skip connections, the context-enriched tokens its
    last stage. name: "unet", "fpn" or "upernet". channels: of the decoder, by default those of the
    library; for "unet" one number a block, for the others one number.
    """

    def __init__(
        self, trunk: Trunk, name: str, maps: int, output_stride: int, channels: Any
    ) -> None:
        super().__init__()
        try:
            from segmentation_models_pytorch.base import SegmentationHead as Maps
            from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
            from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
            from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
        except ImportError as error:
            raise ImportError(
                "Decoders need segmentation_models_pytorch: pip install 'xt-kernels[seg]'."
            ) from error
        if name not in DECODERS:
            fail("SmpDecoder", "decoder", f"be one of {', '.join(DECODERS)}", repr(name))
        # The library counts from the image: strides 1, 2, 4, ...; where the encoder has no stage,
        # its own timm encoders have a map of no channels.
        depth = trunk.stride.bit_length() - 1
        by_stride = dict(zip(trunk.strides, range(len(trunk.strides)), strict=True))
        is_pyramid = trunk.stride == 1 << depth and set(by_stride) <= {2**i for i in range(depth)}
        if not is_pyramid or (name != "unet" and set(by_stride) != {4, 8, 16}):
            needed = "powers of two" if name == "unet" else "4, 8, 16, 32"
            strides = [*trunk.strides, trunk.stride]
            fail("SmpDecoder", "decoder", f"see stages of strides {needed} as {name!r}", strides)
        self.stage_of = [by_stride.get(2**i) for i in range(depth)]
        widths = [0 if i is None else trunk.channels[i] for i in self.stage_of]
        widths.append(trunk.token_dim)
        if name == "unet":
            blocks = (trunk.stride // output_stride).bit_length() - 1
            channels = UNET_CHANNELS[:blocks] if channels is None else tuple(channels)
            if len(channels) != blocks or not blocks:
                rule = f"be one number for each of {blocks} blocks, from stride {trunk.stride} to"
                fail("SmpDecoder", "decoder_channels", f"{rule} {output_stride}", channels)
            self.decoder = UnetDecoder(widths, channels, n_blocks=blocks)
            self.maps = Maps(channels[-1], maps, kernel_size=3)
        else:
            if output_stride > 4:
                fail("SmpDecoder", "output_stride", f"be at most 4 for {name!r}", output_stride)
            more = {} if channels is None else {"decoder_channels": int(channels)}
            if name == "fpn":
                more = {} if channels is None else {"segmentation_channels": int(channels)}
                self.decoder = FPNDecoder(widths, depth, **more)
                width = self.decoder.out_channels
            else:
                self.decoder = UPerNetDecoder(widths, depth, **more)
                width = more.get("decoder_channels", 256)
            self.maps = Maps(width, maps, kernel_size=1, upsampling=4 // output_stride)

    def forward(self, tokens: torch.Tensor, stages: dict[int, torch.Tensor]) -> torch.Tensor:
        depth, (count, _, height, width) = len(self.stage_of), tokens.shape
        features = [
            tokens.new_empty(count, 0, height << depth - i, width << depth - i)
            if stage is None
            else stages[stage]
            for i, stage in enumerate(self.stage_of)
        ]
        out: torch.Tensor = self.maps(self.decoder([*features, tokens]))
        return out


class SegmentationHead(MapHead):
    """Logits by a decoder of `segmentation_models_pytorch`: see `SmpDecoder` and `MapHead`.

    group: regions a side that are decoded at once; convolutions see zeros beyond them.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        classes: int,
        decoder: str = "unet",
        decoder_channels: Sequence[int] | int | None = None,
        loss: str = "cross_entropy",
        output_stride: int = 1,
        pos_weight: float | None = None,
        ignore_index: int = 255,
        group: int | None = 1,
    ) -> None:
        stages = tuple(range(len(trunk.channels)))
        super().__init__(
            trunk, classes, loss, output_stride, pos_weight, ignore_index, group, stages
        )
        self.decode = SmpDecoder(trunk, decoder, classes, output_stride, decoder_channels)

    def forward(self, tokens: torch.Tensor, stages: dict[int, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.decode(tokens, stages)
        return out
