"""How far context reaches: in pixels by arithmetic, in chunks by trial, as a map by gradient.

Arithmetic ("xT", Gupta et al. 2024, table 1): a chunk holds C regions of R x R pixels; each of N
layers attends to the m chunks before, so the last chunk sees itself and N m others,

    context = (N m + 1) C R^2 pixels

Trial: each chunk is changed in turn, and the output of one chunk is looked at. Map (figure 4 of the
paper; Luo et al. 2016): |d token / d pixel|, averaged over images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .context_encoder import ContextEncoder, Memory
from .mamba import MambaContextEncoder
from .model import XT, map_index

Map = np.ndarray[Any, np.dtype[np.float32]]


def context_length(
    region: int, *, layers: int, chunk_regions: int = 1, memory_chunks: int = 1
) -> int:
    """Pixels that a token of the last chunk can see: (N m + 1) C R^2, unless the image ends sooner.

    region: side R in pixels. layers: N. chunk_regions: C. memory_chunks: m chunks that each layer
    remembers; 1 in table 1 of the paper, 0 without memory. Raises ValueError for lower numbers.
    """
    for name, value, least in (
        ("region", region, 1),
        ("layers", layers, 0),
        ("chunk_regions", chunk_regions, 1),
        ("memory_chunks", memory_chunks, 0),
    ):
        if value < least:
            raise ValueError(f"context_length: {name} must be at least {least}, got {value}.")
    return (layers * memory_chunks + 1) * chunk_regions * region**2


def model_context_length(model: XT, height: int, width: int) -> int:
    """Pixels that a token of `model` can see in an image of `height` x `width` pixels, at most.

    Without context encoder that is one region; with the whole image as one chunk, or with a state
    that all chunks before have shaped (Mamba), it is the image.
    """
    grid, config = model.grid(height, width), model.config
    if isinstance(model.context, MambaContextEncoder):
        return height * width
    if model.context is None:
        length = context_length(config.region, layers=0)
    else:
        length = context_length(
            config.region,
            layers=config.depth,
            chunk_regions=config.chunk_regions or grid.num_regions,
            memory_chunks=model.context.memory_chunks,
        )
    return min(length, height * width)


@torch.no_grad()
def visible_chunks(
    encoder: ContextEncoder | MambaContextEncoder,
    num_chunks: int,
    *,
    length: int = 4,
    seed: int = 0,
) -> list[int]:
    """Which of `num_chunks` chunks of `length` tokens can change the output of the last one.

    Each chunk is replaced by other noise in turn. A copy of the encoder in fp64 on the CPU does it:
    what comes through several layers from afar is lost in the rounding of fp32.
    Raises ValueError if num_chunks or length is below 1.
    """
    if num_chunks < 1 or length < 1:
        raise ValueError(
            f"visible_chunks: num_chunks and length must be at least 1, got {num_chunks}, {length}."
        )
    encoder = copy.deepcopy(encoder).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    shape = 2, num_chunks, 1, length, encoder.dim
    chunks, others = torch.randn(shape, dtype=torch.float64, generator=generator)

    def last(changed: int | None) -> torch.Tensor:
        memory: Memory | None = None
        out: torch.Tensor = chunks[0]
        for k, tokens in enumerate(chunks):
            out, memory = encoder(others[k] if k == changed else tokens, memory)
        return out

    before = last(None)
    return [k for k in range(num_chunks) if not torch.equal(last(k), before)]


@torch.no_grad()
def visible_image_chunks(
    model: XT, height: int, width: int, chunk: int = -1, *, seed: int = 0
) -> list[int]:
    """Which chunks of pixels can change the tokens of chunk number `chunk`, the last by default.

    As `visible_chunks`, on the pixels of a noise image. Chunks are numbered in the order of the
    model's walk; a first pass ("two-stream") has no numbers of its own.
    Raises ValueError if there is no such chunk.
    """
    grid = model.grid(height, width)
    chunks = [list(step.regions) for step in model.walk(grid) if step.emit]
    if not -len(chunks) <= chunk < len(chunks):
        raise ValueError(
            f"visible_image_chunks: chunk must be below the {len(chunks)} there are, got {chunk}."
        )
    places = map_index(grid.placement(chunks[chunk], model.stride), grid, model.stride)
    model = copy.deepcopy(model).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    shape = 2, model.config.in_chans, height, width
    image, other = torch.randn(shape, dtype=torch.float64, generator=generator)
    before = model(image).tokens[:, places]
    seen = []
    for k, regions in enumerate(chunks):
        changed = image.clone()
        for top, left, rows, cols in map(grid.box, regions):
            box = (slice(None), slice(top, top + rows), slice(left, left + cols))
            changed[box] = other[box]
        if not torch.equal(model(changed).tokens[:, places], before):
            seen.append(k)
    return seen


def effective_receptive_field(
    model: XT,
    images: Iterable[torch.Tensor],
    *,
    token: tuple[int, int] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Map:
    """|d token / d pixel|, summed over bands, averaged over images: float32 `[H, W]`.

    images: pixels `[C, H, W]` of one size, as `XT.forward` takes them; the gradient is with respect
        to floats as they are, to unsigned integers scaled to [0, 1]. All of an image is in memory.
    token: (row, column) in the token map; by default `centre_token`.
    seed: of the signs, +1 or -1 at random, with which the token's channels are added up. A plain
        sum is constant behind a LayerNorm, and its gradient rounding noise.
    progress: called with the number of images done since the last call.

    Where `XLContextEncoder` stops the gradient to the chunks before it, it goes through for this
    measurement: the map shows what values can reach, not what learns. The first pass of
    "two-stream" runs without gradient, so what comes by it alone is not in the map, though it does
    change the token (`visible_image_chunks` sees it).
    Raises ValueError if there are no images, sizes differ, the token is outside, or the gradient is
    zero everywhere or not finite.
    """
    name = "effective_receptive_field"
    total: torch.Tensor | None = None
    count, device = 0, next(model.parameters()).device
    signs = torch.randint(
        0, 2, (model.num_features,), generator=torch.Generator().manual_seed(seed)
    )
    with _gradient_through(model):
        for image in images:
            if image.dim() != 3 or (total is not None and image.shape[1:] != total.shape):
                size = "*, *" if total is None else ", ".join(map(str, total.shape))
                raise ValueError(
                    f"{name}: images must be [C, H, W] = [{model.config.in_chans}, {size}], "
                    f"got {list(image.shape)}."
                )
            at = _token_index(model, image.shape[1], image.shape[2], token)
            pixels, fed = _leaf(model, image.to(device))
            features = model(fed).tokens[0, at]
            value = (features * (signs.to(features) * 2 - 1)).sum()
            (grad,) = torch.autograd.grad(value, pixels)
            new = grad.abs().sum(0, dtype=torch.float64).cpu()
            total, count = new if total is None else total + new, count + 1
            if progress is not None:
                progress(1)
    if total is None:
        raise ValueError(f"{name}: images must hold at least one image, got none.")
    if not total.isfinite().all() or not total.any():
        found = "zero everywhere" if not total.any() else "not finite"
        raise ValueError(f"{name}: the gradient of the token is {found}.")
    return np.asarray((total / count).numpy(), dtype=np.float32)


def centre_token(model: XT, height: int, width: int) -> tuple[int, int]:
    """(row, column) of the token at the centre of the region that the model visits last."""
    grid = model.grid(height, width)
    top, left, rows, cols = grid.box(model.walk(grid)[-1].regions[-1])
    return (top + rows // 2) // model.stride, (left + cols // 2) // model.stride


def token_region(model: XT, height: int, width: int, token: tuple[int, int] | None = None) -> int:
    """Number of the region that holds a token; token as in `effective_receptive_field`."""
    cols = model.grid(height, width).token_shape(model.stride)[1]
    row, col = divmod(_token_index(model, height, width, token), cols)
    side = model.config.region // model.stride
    return row // side * model.grid(height, width).cols + col // side


def receptive_field_numbers(
    model: XT, field: Map, token: tuple[int, int] | None = None
) -> dict[str, float]:
    """What a map says in numbers; token as in `effective_receptive_field`.

    region_share, chunk_share, outside_share: of the gradient mass, inside the token's own region,
        inside its chunk (its region included), and outside its chunk. Without context encoder
        chunk means region.
    radius_50, radius_95: pixels around the token's centre that hold 50 and 95 % of the mass.
    nonzero: share of pixels with any gradient. context_px: `model_context_length`.
    """
    height, width = field.shape
    grid, own = model.grid(height, width), token_region(model, height, width, token)
    chunk: tuple[int, ...] = (own,)
    if model.context is not None:
        chunk = next(s.regions for s in model.walk(grid) if s.emit and own in s.regions)
    mass = field.astype(np.float64) / field.sum(dtype=np.float64)

    def share(regions: Iterable[int]) -> float:
        boxes = map(grid.box, regions)
        return float(sum(mass[top : top + h, left : left + w].sum() for top, left, h, w in boxes))

    at = divmod(_token_index(model, height, width, token), grid.token_shape(model.stride)[1])
    y, x = (i * model.stride + (model.stride - 1) / 2 for i in at)
    distance = np.hypot(np.arange(height)[:, None] - y, np.arange(width) - x).ravel()
    order = distance.argsort(kind="stable")
    held = mass.ravel()[order].cumsum()
    radius = [float(distance[order[np.searchsorted(held, q * held[-1])]]) for q in (0.5, 0.95)]
    return {
        "region_share": share([own]),
        "chunk_share": share(chunk),
        "outside_share": share(set(range(grid.num_regions)) - set(chunk)),
        "radius_50": radius[0],
        "radius_95": radius[1],
        "nonzero": float((field != 0).mean()),
        "context_px": model_context_length(model, height, width),
    }


def _token_index(model: XT, height: int, width: int, token: tuple[int, int] | None) -> int:
    rows, cols = model.grid(height, width).token_shape(model.stride)
    row, col = centre_token(model, height, width) if token is None else token
    if not (0 <= row < rows and 0 <= col < cols):
        raise ValueError(
            f"receptive field: token must be (row, column) in the token map of {rows} x {cols}, "
            f"got ({row}, {col})."
        )
    return row * cols + col


def _leaf(model: XT, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float pixels that take the gradient, what to give the model for the result of `image`)."""
    if image.is_floating_point():
        pixels = image.detach().clone().requires_grad_()
        return pixels, pixels
    if image.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(
            f"receptive field: pixels must be uint8, uint16 or float, got {image.dtype}."
        )
    pixels = (image.float() / torch.iinfo(image.dtype).max).requires_grad_()

    def column(values: Iterable[float] | None, default: float) -> torch.Tensor:
        return pixels.new_tensor(list(values or [default]))[:, None, None]

    mean, std = model.normalization(image.dtype)
    later_mean, later_std = model.normalization(torch.float32)  # what the model does to floats
    normal = (pixels - column(mean, 0)) / column(std, 1)
    return pixels, normal * column(later_std, 1) + column(later_mean, 0)


@contextmanager
def _gradient_through(model: XT) -> Iterator[None]:
    """Evaluation mode, gradients recorded, and memory that lets them through; then as before."""
    modes, context = [(m, m.training) for m in model.modules()], model.context
    before = None if context is None else context.gradient
    try:
        model.eval()
        if context is not None:
            context.gradient = "through"
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        if context is not None and before is not None:
            context.gradient = before
