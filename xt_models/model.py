"""xT: regions -> region encoder -> stitched tokens -> context encoder -> head (paper, figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xt_kernels.regions import Placement, RegionGrid, extract_regions, stitch_regions
from xt_kernels.selective_scan.api import BACKENDS, MAX_STATES

from .checkpoint import HubModel
from .context_encoder import ContextEncoder, Memory
from .grid import TILINGS, Step, Tiling, walk
from .heads import ClassificationHead, GroupHead, PlainHead, Trunk, build_head, run_head
from .mamba import FORMS, MambaContextEncoder
from .region_encoder import RegionEncoder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTEXTS = ("xl", "hyper", "mamba", "vit")


@dataclass(frozen=True)
class XTConfig:
    """Everything that defines an XT model, plain values only.

    encoder: timm model name. region: side of the regions, pixels. in_chans: bands of the image.
    num_classes: of the classification head, 0 for none.
    heads: further heads, name -> {"kind": ..., options}, as in docs/heads.md.
    context: "xl" (memory carried from chunk to chunk), "hyper", "mamba" (state carried), "vit", or
        None (no context).
    dim, depth, num_heads, mlp_ratio, causal, memory, gradient, gradient_chunks: of the context
        encoder, as in `XLContextEncoder`. Mamba takes dim, depth, gradient and gradient_chunks of
        them: it has no heads and no MLP, is causal, and its state stands for all chunks before.
    mamba_form: "residual", or "released", whose reversed layers need the whole image as one chunk,
        as in `MambaContextEncoder`.
    mamba_d_state, mamba_d_conv, mamba_expand: sizes of its mixers, as in `MambaMixer`.
    mamba_backend: "xt", or "mamba_ssm", whose scan takes no state: with form "released" alone.
    pool: "mean" of all tokens, or "token", a class token appended last (whole-image chunk only).
    chunk_regions: regions a chunk; None is the whole image in one chunk: memory grows with it.
    memory_chunks: earlier chunks that each XL layer remembers.
    tiling: "row", "zigzag" or "two-stream".
    residual: add the projected output to the raw features (the paper's satellite form).
    mean, std: one number a band, after unsigned integers are scaled to [0, 1]. None: ImageNet's
        for three unsigned bands, 0.5 for another number of them; floats are taken as they are.
    """

    encoder: str = "swinv2_tiny_window16_256"
    region: int = 256
    in_chans: int = 3
    num_classes: int = 0
    context: str | None = "xl"
    dim: int = 768
    depth: int = 2
    num_heads: int = 6
    mlp_ratio: float = 4.0
    causal: bool = False
    memory: str = "hidden"
    gradient: str = "stop"
    gradient_chunks: int = 4
    mamba_form: str = "residual"
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: float = 2
    mamba_backend: str = "xt"
    pool: str = "mean"
    chunk_regions: int | None = 16
    memory_chunks: int = 1
    tiling: Tiling = "row"
    residual: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise ValueError(f"XTConfig: {name} must be {rule}, got {getattr(self, name)!r}.")

        check("region", self.region >= 1, "at least 1 pixel")
        check("in_chans", self.in_chans >= 1, "at least 1")
        check("num_classes", self.num_classes >= 0, "at least 0")
        check("context", self.context in (*CONTEXTS, None), f"one of {', '.join(CONTEXTS)} or None")
        check("tiling", self.tiling in TILINGS, f"one of {', '.join(TILINGS)}")
        check("pool", self.pool in ("mean", "token"), "'mean' or 'token'")
        check("chunk_regions", (self.chunk_regions or 1) >= 1, "at least 1, or None")
        check("heads", isinstance(self.heads, dict), "a dict, name -> options")
        check("dim", self.dim >= 4 and self.dim % 4 == 0, "a positive multiple of 4")
        check(
            "pool",
            self.pool == "mean" or (self.context is not None and self.chunk_regions is None),
            "'mean' unless a context encoder sees the whole image as one chunk "
            "(chunk_regions=None)",
        )
        check(
            "tiling",
            self.tiling != "two-stream" or self.context in ("xl", "mamba"),
            "'row' or 'zigzag' unless context is 'xl' or 'mamba': only memory carries a first pass",
        )
        check("mamba_form", self.mamba_form in FORMS, f"one of {', '.join(FORMS)}")
        check(
            "mamba_form",
            self.mamba_form == "residual" or self.context != "mamba" or self.chunk_regions is None,
            "'residual' unless the whole image is one chunk (chunk_regions=None): reversed layers "
            "start at the image's last token, which one pass over chunks has not seen yet",
        )
        check("mamba_d_state", 1 <= self.mamba_d_state <= MAX_STATES, f"1 to {MAX_STATES}")
        check("mamba_d_conv", self.mamba_d_conv >= 1, "at least 1")
        check("mamba_expand", self.mamba_expand * self.dim >= 1, "at least 1 / dim")
        check("mamba_backend", self.mamba_backend in BACKENDS, f"one of {', '.join(BACKENDS)}")
        check(
            "mamba_backend",
            self.mamba_backend == "xt" or self.mamba_form == "released",
            "'xt' unless mamba_form is 'released': the scan of mamba_ssm takes no state",
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                value = tuple(float(v) for v in value)
                object.__setattr__(self, name, value)
                check(name, len(value) == self.in_chans, f"in_chans = {self.in_chans} numbers")
        if self.std is not None:
            check("std", all(v > 0 for v in self.std), "positive numbers")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> XTConfig:
        """The config with these fields. Raises ValueError for a field that there is not."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"XTConfig: unknown field {', '.join(unknown)}.")
        return cls(**values)


class Encoded(NamedTuple):
    """What the region encoder gives of R regions: features `[R, t, t, C]` for the context encoder;
    raw `[R, t, t, D]` where the residual form needs them; stages, earlier ones that heads need,
    number -> `[R, s_i, s_i, C_i]`.
    """

    features: torch.Tensor
    raw: torch.Tensor | None
    stages: dict[int, torch.Tensor]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Encoded:
        """Each tensor changed."""
        raw = None if self.raw is None else change(self.raw)
        return Encoded(change(self.features), raw, {i: change(m) for i, m in self.stages.items()})

    @staticmethod
    def cat(parts: Sequence[Encoded]) -> Encoded:
        """Parts one after the other."""
        if len(parts) == 1:
            return parts[0]
        raw = [part.raw for part in parts if part.raw is not None]
        return Encoded(
            torch.cat([part.features for part in parts]),
            torch.cat(raw) if raw else None,
            {i: torch.cat([part.stages[i] for part in parts]) for i in parts[0].stages},
        )


class XTOutput(NamedTuple):
    """logits `[B, classes]` or None; tokens `[B, rows * cols, C]` row-major over the image;
    embedding `[B, C]`; memory for a following image part (XL, Mamba) or None; heads: the output of
    each head of `XTConfig.heads` by its name.
    """

    logits: torch.Tensor | None
    tokens: torch.Tensor
    embedding: torch.Tensor
    memory: Memory | None
    heads: dict[str, Any]


class XT(nn.Module, HubModel):
    """The whole model. `create_model` builds it, `save_pretrained` and `from_pretrained` keep it.

    config: what to build; a dict of the same fields works too.
    region_encoder: a ready encoder to use instead of building `config.encoder` with random weights.

    Attributes: head, the classification head or None; heads, the others by name, each with
    `loss(output, target)` and `predict(output)`; class_names, of the classes of a head in their
    order, by its name, "head" for the first, where they are known; recompute, regions that go
    through the region encoder and through heads on maps at once while gradients are recorded, and
    once more in the backward pass, None for all at once and nothing again. Batch norm in a decoder
    then takes its statistics over that many.
    """

    config: XTConfig

    def __init__(
        self, config: XTConfig | dict[str, Any], region_encoder: RegionEncoder | None = None
    ) -> None:
        super().__init__()
        if isinstance(config, dict):  # as read back from config.json
            config = XTConfig.from_dict(config)
        self.config = config
        self.region_encoder = region_encoder or RegionEncoder(
            config.encoder, region=config.region, in_chans=config.in_chans
        )
        features = self.region_encoder.num_features
        self.context: ContextEncoder | MambaContextEncoder | None = None
        self.input_proj: nn.Module = nn.Identity()
        self.output_proj: nn.Linear | None = None
        self.class_token: nn.Parameter | None = None
        if config.context is not None:
            self.input_proj = nn.Linear(features, config.dim)
            if config.context == "mamba":
                self.context = MambaContextEncoder(
                    config.dim,
                    config.depth,
                    d_state=config.mamba_d_state,
                    d_conv=config.mamba_d_conv,
                    expand=config.mamba_expand,
                    backend=config.mamba_backend,
                    form=config.mamba_form,
                    carry=config.mamba_form == "residual",
                    gradient=config.gradient,
                    gradient_chunks=config.gradient_chunks,
                )
            else:
                self.context = ContextEncoder(
                    config.dim,
                    config.depth,
                    config.num_heads,
                    config.mlp_ratio,
                    attention="exact" if config.context == "vit" else "hyper",
                    memory=config.memory,
                    memory_chunks=config.memory_chunks if config.context == "xl" else 0,
                    gradient=config.gradient,
                    gradient_chunks=config.gradient_chunks,
                    causal=config.causal,
                )
            if config.residual:
                self.output_proj = nn.Linear(config.dim, features)
            if config.pool == "token":
                self.class_token = nn.Parameter(torch.empty(1, 1, config.dim).normal_(std=0.02))
        elif config.residual:
            raise ValueError(
                "XTConfig: residual must be False without a context encoder, got True."
            )
        self.num_features = features if self.context is None or config.residual else config.dim
        head_dim = config.dim if self.class_token is not None else self.num_features
        self.head: nn.Module | None = None
        if config.num_classes:
            kind = PlainHead if self.context is None else ClassificationHead
            self.head = kind(head_dim, config.num_classes)
        trunk = Trunk(
            head_dim,
            self.num_features,
            self.stride,
            tuple(self.region_encoder.channels[:-1]),
            tuple(self.region_encoder.strides[:-1]),
        )
        self.heads = nn.ModuleDict(
            {name: build_head(name, options, trunk) for name, options in config.heads.items()}
        )
        self.recompute: int | None = None
        self.class_names: dict[str, tuple[str, ...]] = {}

    @property
    def stride(self) -> int:
        """Pixels a token, along each side."""
        return int(self.region_encoder.stride)

    @property
    def reach(self) -> int:
        """How many chunks back a token can see through memory."""
        return 0 if self.context is None else int(self.context.reach)

    def grid(self, height: int, width: int) -> RegionGrid:
        """The regions of an image of `height` x `width` pixels."""
        return RegionGrid(height, width, self.config.region)

    def walk(self, grid: RegionGrid) -> list[Step]:
        """The chunks of the image in the order of this model's walk."""
        return walk(grid, self.config.chunk_regions, self.config.tiling, self.reach)

    def normalization(
        self, dtype: torch.dtype
    ) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """(mean, std) for pixels of `dtype`, as `XTConfig` says."""
        bands, unsigned = self.config.in_chans, dtype in (torch.uint8, torch.uint16)
        mean, std = self.config.mean, self.config.std
        if mean is None and unsigned:
            mean = IMAGENET_MEAN if bands == 3 else (0.5,) * bands
        if std is None and unsigned:
            std = IMAGENET_STD if bands == 3 else (0.5,) * bands
        return mean, std

    def extract(
        self,
        image: torch.Tensor,
        grid: RegionGrid,
        regions: Sequence[int] | None = None,
        origin: tuple[int, int] = (0, 0),
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalised regions `[.., R, C, s, s]` of a window of pixels, in the model's dtype."""
        mean, std = self.normalization(image.dtype)
        dtype = next(self.parameters()).dtype if out is None else out.dtype
        return extract_regions(
            image, grid, regions=regions, origin=origin, mean=mean, std=std, dtype=dtype, out=out
        )

    @property
    def group_heads(self) -> dict[str, GroupHead]:
        """The heads that see groups of regions, by name; the others see the embedding."""
        return {name: head for name, head in self.heads.items() if isinstance(head, GroupHead)}

    @property
    def stages(self) -> tuple[int, ...]:
        """Numbers of the region encoder's earlier stages that heads use."""
        return tuple(sorted({i for head in self.group_heads.values() for i in head.stages}))

    def encode(
        self,
        regions: torch.Tensor,
        region_encoder: RegionEncoder | None = None,
        *,
        stages: bool = True,
    ) -> Encoded:
        """regions `[R, C, s, s]`, normalised.

        region_encoder: a copy to use instead of the model's, in another dtype perhaps. stages: give
            the earlier stages that heads use.
        """
        encoder = self.region_encoder if region_encoder is None else region_encoder
        maps: dict[int, torch.Tensor] = {}
        if stages and self.stages:
            *earlier, raw = encoder.forward_stages(regions)
            maps = {i: earlier[i] for i in self.stages}
        else:
            raw = encoder(regions)
        if region_encoder is not None:
            dtype = next(self.parameters()).dtype
            raw, maps = raw.to(dtype), {i: m.to(dtype) for i, m in maps.items()}
        return Encoded(self.input_proj(raw), raw if self.output_proj is not None else None, maps)

    def _encode_all(self, regions: torch.Tensor) -> Encoded:
        """`encode`, as `recompute` says."""
        if self.recompute is None or not torch.is_grad_enabled():
            return self.encode(regions)
        parts = torch.split(regions, self.recompute)
        return Encoded.cat([checkpoint(self.encode, part, use_reentrant=False) for part in parts])

    def stitch(
        self,
        features: torch.Tensor,
        grid: RegionGrid,
        regions: Sequence[int] | None = None,
        chunk: Sequence[int] | None = None,
        out: torch.Tensor | None = None,
        *,
        position: bool = True,
    ) -> torch.Tensor:
        """Features `[.., R, t, t, C]` at their places among the tokens of `chunk`, `[.., L, C]`."""
        return stitch_regions(
            features,
            grid,
            regions=regions,
            chunk=chunk,
            channels_last=True,
            position=position and self.context is not None,
            out=out,
        )

    def mix(
        self, tokens: torch.Tensor, raw: torch.Tensor | None, memory: Memory | None
    ) -> tuple[torch.Tensor, torch.Tensor, Memory | None]:
        """One chunk through the context encoder.

        tokens `[B, L, C]`; raw `[B, L, D]` for the residual form. Returns the tokens, the chunk's
        part of the embedding `[B, C]` (class token, or sum of its tokens), and the new memory.
        """
        if self.context is None:
            return tokens, tokens.sum(1), None
        if self.class_token is not None:
            tokens = torch.cat([tokens, self.class_token.expand(len(tokens), -1, -1)], dim=1)
        tokens, memory = self.context(tokens, memory)
        summary = None
        if self.class_token is not None:
            tokens, summary = tokens[:, :-1], tokens[:, -1]
        if self.output_proj is not None:
            tokens = raw + self.output_proj(tokens)
        return tokens, tokens.sum(1) if summary is None else summary, memory

    def embed(self, summary: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The image embedding `[B, C]` from the sum of the chunks' parts."""
        return summary if self.class_token is not None else summary / num_tokens

    def forward(self, image: torch.Tensor, memory: Memory | None = None) -> XTOutput:
        """Runs the same walk as `stream`, with the whole image in memory.

        image: pixels `[B, C, H, W]` or `[C, H, W]`, uint8, uint16 or float, not normalised
            (floats are taken as they are unless the config names mean and std).
        """
        if image.dim() == 3:
            image = image[None]
        if image.dim() != 4 or image.shape[1] != self.config.in_chans:
            raise ValueError(
                f"XT: image must be [B, C, H, W] with C = {self.config.in_chans}, "
                f"got {list(image.shape)}."
            )
        grid = self.grid(*image.shape[2:])
        regions = self.extract(image, grid)  # [B, R, C, s, s]
        encoded = self._encode_all(regions.flatten(0, 1))
        return self.forward_encoded(
            encoded.map(lambda t: t.view(len(image), -1, *t.shape[1:])), grid, memory
        )

    def forward_encoded(
        self, encoded: Encoded, grid: RegionGrid, memory: Memory | None = None
    ) -> XTOutput:
        """What follows the region encoder in `forward`.

        encoded: of all regions of the grid, row-major, features `[B, R, t, t, C]` and the others
            alike.
        """
        features, raw, stages = encoded
        batch = features.shape[0]
        kept, places = [], []
        summary: torch.Tensor | None = None
        for step in self.walk(grid):
            chunk = list(step.regions)
            tokens = self.stitch(features[:, chunk], grid, chunk, chunk)
            chunk_raw = None
            if raw is not None:
                chunk_raw = self.stitch(raw[:, chunk], grid, chunk, chunk, position=False)
            # A first pass fills the memory, and nothing learns from it.
            with torch.set_grad_enabled(torch.is_grad_enabled() and step.emit):
                tokens, part, memory = self.mix(tokens, chunk_raw, memory)
            if step.emit:
                kept.append(tokens)
                places.append(map_index(grid.placement(chunk, self.stride), grid, self.stride))
                summary = part if summary is None else summary + part
        assert summary is not None
        place = torch.cat(places).to(features.device)
        tokens = torch.cat(kept, dim=1)[:, place.argsort()]
        embedding = self.embed(summary, tokens.shape[1])
        logits = None if self.head is None else self.head(embedding)
        token_map = tokens.view(batch, *grid.token_shape(self.stride), -1)
        recompute = self.recompute if torch.is_grad_enabled() else None
        outputs = {
            name: run_head(head, token_map, stages, grid, self.stride, recompute)
            if isinstance(head, GroupHead)
            else head(embedding)
            for name, head in self.heads.items()
        }
        return XTOutput(logits, tokens, embedding, memory, outputs)


def map_index(placement: Placement, grid: RegionGrid, stride: int) -> torch.Tensor:
    """Row-major index in the image's token map of each token of a chunk, int64 `[L]`."""
    out = torch.empty(placement.length, dtype=torch.int64)
    cols = grid.token_shape(stride)[1]
    for start, pitch, height, width, row, col in placement.table.tolist():
        rows = torch.arange(row, row + height)[:, None] * cols
        out.as_strided((height, width), (pitch, 1), start).copy_(
            rows + torch.arange(col, col + width)
        )
    return out
