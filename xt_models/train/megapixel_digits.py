"""Megapixel digits: canvases of 1,024 to 4,096 px whose label two far places tell together.

A canvas of 8 x 8 regions, a side of 1,024 px and up, is blank but for some glyphs of 64 px, each in
a region of its own: one real handwritten digit in each quadrant, four different ones; four equal
cues, each a map of the canvas with one quadrant bright; and scribbles, digits cut into 16 tiles and
shuffled. The label is the digit in the quadrant that the cues name. A glyph lies anywhere in its
region, on a raster of 16 px, whatever the side of the canvas, and rides the carrier (-1)^(row +
column), so a canvas down-sampled by two is blank. The canvas has four bands of two rows of regions:
cues lie in bands without a digit, and at least one whole region away from every digit.

Ceilings, for any model whatever. The test set holds each canvas four times: its digits move on by
one quadrant, whole regions with all their pixels, and all else stays. Over the four

    down-sampled       the canvas is blank, and each class comes equally often     10 %
    a digit's region   it is the named one in one of the four, else another        25 %
    a bag of regions   the same in all four, and the label is each digit once      25 %

A bag is the regions without their places, as a model pools them that encodes each alone.

Models train on canvases of 1,024 px alone. Regions of larger canvases are larger: the region
encoder, convolutions and a maximum over places, gives one token a region of any side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from xt_kernels import RegionGrid

from ..host import need
from ..model import XT, XTConfig
from ..region_encoder import RegionEncoder
from .curve import CLIP, LEARNING_RATE, WARM_UP, Point, learn
from .digits import CLASSES, Digits, carried, cues, load, pick

NAME, METRIC, METRICS = "megapixel-digits", "accuracy", "accuracies"
SIDE, SIDES = 1024, (1024, 2048, 4096)
REGIONS, GLYPH, RASTER = 8, 64, 16
GRID = RegionGrid(SIDE, SIDE, SIDE // REGIONS)
CUES, SCRIBBLES = 4, 4
DIM, DEPTH, HEADS = 64, 2, 2
GROUPS, STEPS, EVALUATE_EVERY = 8, 1600, 100
BATCH = 4 * GROUPS
NAMED_WEIGHT = 4.0
TEST_SEED, TEST_GROUPS = 1, 100
CEILING = "ceiling without context, 25 %", 25.0


@dataclass(frozen=True)
class Row:
    """One line of the table: settings of `XTConfig` on top of those that all rows share.

    down_sampled: the model sees the canvas down-sampled by two, and enlarged again.
    ceiling: highest possible accuracy, in percent; None where nothing bounds it.
    """

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    down_sampled: bool = False
    ceiling: float | None = None


_BAND = {"chunk_regions": 2 * REGIONS}
_XL = _BAND | {"context": "xl", "memory_chunks": 3, "tiling": "two-stream"}
ROWS = {
    "downsampled": Row(
        "down-sampled by two, context over it", {"context": "vit"}, down_sampled=True, ceiling=10.0
    ),
    "region-only": Row("each region alone", {"context": None}, ceiling=25.0),
    "xl-no-memory": Row("context in chunks of a band, no memory", _BAND | {"context": "vit"}),
    "whole": Row("context over all regions", {"context": "vit"}),
    "xl-stop": Row("XL, two-stream, stop-gradient", _XL),
    "xl-through": Row("XL, two-stream, gradient through memory", _XL | {"gradient": "through"}),
}


class Layout(NamedTuple):
    """N groups of four canvases that differ in the quadrants of their digits alone.

    classes, digits: of the four digits, and the numbers of their images `[N, 4]`; named: the
    quadrant that the cues name `[N]`, 0 to 3 for NW, NE, SW, SE; places: region numbers of digits
    (by quadrant), cues and scribbles `[N, G]`; shift: where in its region each glyph lies, in
    [0, 1) `[N, G, 2]`; scribbles: 16 tiles of 2 x 2 px `[N, S, 16, 4]`.

    Canvas k of a group, `4 * group + k`, shows digit i in quadrant (i + k) mod 4.
    """

    classes: torch.Tensor
    digits: torch.Tensor
    named: torch.Tensor
    places: torch.Tensor
    shift: torch.Tensor
    scribbles: torch.Tensor


def check() -> None:
    """Raises ValueError, with the way to install it, if scikit-learn is missing."""
    need(NAME, "sklearn", "scikit-learn", "train")


def settings() -> dict[str, Any]:
    """What all runs share, for the record."""
    return {
        "batch": BATCH, "learning_rate": LEARNING_RATE, "warm_up": WARM_UP, "clip": CLIP,
        "dim": DIM, "depth": DEPTH, "heads": HEADS, "side": SIDE, "test_sides": list(SIDES),
        "test_images": 4 * TEST_GROUPS,
    }  # fmt: skip


def draw(digits: Digits, groups: int, generator: torch.Generator, balanced: bool = False) -> Layout:
    """Random groups of four canvases; all digits equally often if balanced (groups of ten)."""

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def some(free: torch.Tensor, number: int) -> torch.Tensor:
        """Numbers of free regions `[N, number]`, of a mask `[N, 64]`."""
        return uniform(*free.shape).masked_fill(~free, 2).argsort(1)[:, :number]

    classes = uniform(groups, CLASSES).argsort(1)[:, :4]
    if balanced:
        classes = (classes[::CLASSES, None] + torch.arange(CLASSES)[:, None]) % CLASSES
        classes = classes.flatten(0, 1)
    picked = pick(digits, classes, generator)
    quadrant, half = torch.arange(4), REGIONS // 2
    band = 2 * torch.randint(half // 2, (groups, 2), generator=generator)[:, quadrant // 2]
    row = quadrant // 2 * half + band + torch.randint(2, (groups, 4), generator=generator)
    col = quadrant % 2 * half + torch.randint(half, (groups, 4), generator=generator)
    places = row * REGIONS + col  # [N, 4]

    region = torch.arange(REGIONS**2)
    rows, cols = region // REGIONS - row[..., None], region % REGIONS - col[..., None]  # [N, 4, 64]
    is_near = torch.maximum(rows.abs(), cols.abs()) < 2
    in_band = region // REGIONS // 2 == row[..., None] // 2
    places = torch.cat([places, some(~(is_near | in_band).any(1), CUES)], 1)
    free = torch.ones(groups, REGIONS**2, dtype=torch.bool).scatter(1, places, False)
    places = torch.cat([places, some(free, SCRIBBLES)], 1)

    source = torch.randint(len(digits.images), (groups, SCRIBBLES), generator=generator)
    tiles = digits.images[source].unfold(2, 2, 2).unfold(3, 2, 2).reshape(groups, SCRIBBLES, 16, 4)
    order = uniform(groups, SCRIBBLES, 16).argsort(-1)[..., None].expand_as(tiles)
    named = torch.randint(4, (groups,), generator=generator)
    shift = uniform(*places.shape, 2)
    return Layout(classes, picked, named, places, shift, tiles.gather(2, order))


def labels(layout: Layout) -> torch.Tensor:
    """The class of each canvas, `[4 N]`."""
    digit = (layout.named[:, None] - torch.arange(4)) % 4
    return layout.classes.gather(1, digit).flatten()


def named_quadrant(layout: Layout) -> torch.Tensor:
    """Whether a region lies in the quadrant that the cues name, bool `[4 N, 1, 8, 8]`."""
    south = torch.arange(REGIONS) >= REGIONS // 2
    quadrant = 2 * south[:, None] + south
    return (quadrant == layout.named[:, None, None]).repeat_interleave(4, 0)[:, None]


def regions(digits: Digits, layout: Layout, side: int = SIDE) -> torch.Tensor:
    """The regions of each group that hold a glyph, in the order of `Layout.places`: pixels
    `[N, G, s, s]` of canvases with `side` pixels a side."""
    groups, region = len(layout.named), side // REGIONS
    tiles = layout.scribbles.view(groups, -1, 4, 4, 2, 2).transpose(3, 4)
    cue = cues()[layout.named][:, None].expand(-1, CUES, -1, -1)
    glyphs = torch.cat([digits.images[layout.digits], cue, tiles.reshape(groups, -1, 8, 8)], 1)
    start = (layout.shift * ((region - GLYPH) // RASTER + 1)).long() * RASTER
    rows, cols = (start[..., None] + torch.arange(GLYPH)).unbind(2)  # [N, G, 64]
    out = glyphs.new_zeros(*glyphs.shape[:2], region, region)
    group, glyph = torch.arange(groups)[:, None], torch.arange(glyphs.shape[1])
    where = group[..., None, None], glyph[:, None, None], rows[..., None], cols[..., None, :]
    out[where] = carried(glyphs, GLYPH // 8)
    return out


def contents(layout: Layout) -> torch.Tensor:
    """What each region of the canvases holds, `[4 N, 64]`: 0, nothing; 1 + i, glyph i of all
    groups counted on."""
    groups, glyphs = layout.places.shape
    turn = (torch.arange(4) - torch.arange(4)[:, None]) % 4  # [canvas, quadrant] -> digit
    turned = torch.cat([turn, torch.arange(4, glyphs).expand(4, -1)], 1)
    value = 1 + glyphs * torch.arange(groups)[:, None, None] + turned  # [N, 4, G]
    out = torch.zeros(groups, 4, REGIONS**2, dtype=torch.int64)
    return out.scatter(2, layout.places[:, None].expand(-1, 4, -1), value).flatten(0, 1)


def render(digits: Digits, layout: Layout, side: int = SIDE) -> torch.Tensor:
    """The whole canvases of a layout, `[4 N, 1, side, side]`."""
    inked = regions(digits, layout, side).flatten(0, 1)
    out = torch.cat([torch.zeros_like(inked[:1]), inked])[contents(layout)]
    out = out.view(-1, REGIONS, REGIONS, *out.shape[2:]).transpose(2, 3)
    return out.reshape(-1, 1, side, side)


class GlyphEncoder(RegionEncoder):
    """One token a region of any side that is a multiple of 16 px: a patch of 16 px, 4 x 4 patches,
    a linear layer, and the maximum over all places."""

    def __init__(self, region: int) -> None:
        nn.Module.__init__(self)  # nothing of timm
        self.name, self.region, self.in_chans = "glyphs", region, 1
        self.channels, self.strides = [DIM], [region]
        self.num_features, self.stride = DIM, region
        self.model = nn.Sequential(
            nn.Conv2d(1, DIM // 2, RASTER, stride=RASTER, bias=False),
            nn.BatchNorm2d(DIM // 2),
            nn.GELU(),
            nn.Conv2d(DIM // 2, 2 * DIM, GLYPH // RASTER, bias=False),
            nn.BatchNorm2d(2 * DIM),
            nn.GELU(),
            nn.Conv2d(2 * DIM, DIM, 1),
            nn.AdaptiveMaxPool2d(1),
            nn.BatchNorm2d(DIM),
        )

    def forward_stages(self, regions: torch.Tensor) -> list[torch.Tensor]:
        return [self.model(regions).permute(0, 2, 3, 1)]


def build(row: Row, side: int = SIDE) -> XT:
    """The model of a row for canvases of `side` pixels a side, with one dense head, "map": a score
    for each digit in each region, and for its quadrant being the named one."""
    head = {
        "kind": "dense",
        "classes": CLASSES + 1,
        "loss": "bce",
        "output_stride": side // REGIONS,
    }
    shared: dict[str, Any] = {
        "encoder": "glyphs", "region": side // REGIONS, "in_chans": 1, "dim": DIM, "depth": DEPTH,
        "num_heads": HEADS, "mlp_ratio": 2.0, "residual": row.config["context"] is not None,
        "chunk_regions": None, "heads": {"map": head},
    }  # fmt: skip
    return XT(XTConfig(**shared | row.config), GlyphEncoder(side // REGIONS))


def maps(model: XT, row: Row, digits: Digits, layout: Layout, side: int = SIDE) -> torch.Tensor:
    """The map of each canvas of a layout, `[4 N, 11, 8, 8]`, as the model gives it for the whole
    canvas. Equal regions are encoded once: the blank one, and those that the canvases of a group
    share."""
    inked = regions(digits, layout, side).flatten(0, 1)[:, None]
    if row.down_sampled:
        inked = F.interpolate(F.avg_pool2d(inked, 2), scale_factor=2)
    encoded = model.encode(torch.cat([torch.zeros_like(inked[:1]), inked]))
    held = contents(layout)
    out: torch.Tensor = model.forward_encoded(encoded.map(lambda t: t[held]), GRID).heads["map"]
    return out


def votes(maps: torch.Tensor) -> torch.Tensor:
    """Logits of the classes `[B, 10]`: each digit's highest score in any region."""
    return maps[:, :CLASSES].amax((2, 3))


def train(
    name: str,
    seed: int,
    steps: int = STEPS,
    *,
    groups: int = TEST_GROUPS,
    on_steps: Callable[[int], object] = lambda steps: None,
) -> Iterator[Point]:
    """Trains the model of row `name` and yields its curve; the last point is the result, with the
    accuracy at each side of canvases.

    seed: of the weights and the training canvases; the global generators are left as they were.
    steps: batches of 8 groups of four canvases. groups: of the test set, a multiple of ten.
    on_steps: called with the steps just done. How it trains: `curve.learn`.
    """
    row = ROWS[name]
    digits, unseen = load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(row)
    generator = torch.Generator().manual_seed(seed)
    test = draw(unseen, groups, torch.Generator().manual_seed(TEST_SEED), balanced=True)

    def loss() -> torch.Tensor:
        layout = draw(digits, GROUPS, generator)
        found = maps(model, row, digits, layout)
        named = named_quadrant(layout).to(found.dtype)
        return F.cross_entropy(votes(found), labels(layout)) + NAMED_WEIGHT * (
            F.binary_cross_entropy_with_logits(found[:, CLASSES:], named)
        )

    def score() -> float:
        return accuracy(model, row, unseen, test)

    for point in learn(model, loss, score, steps, EVALUATE_EVERY, on_steps):
        if point.step == steps:
            larger = {f"{n:,} px": accuracy(model, row, unseen, test, n) for n in SIDES[1:]}
            point = point._replace(more=larger)
        yield point


@torch.no_grad()
def accuracy(model: XT, row: Row, digits: Digits, layout: Layout, side: int = SIDE) -> float:
    """Percent of the canvases of a layout whose label the model finds, in evaluation mode."""
    right = 0
    model.eval()
    for part in zip(*(torch.split(column, 10) for column in layout), strict=True):
        few = Layout(*part)
        found = votes(maps(model, row, digits, few, side)).argmax(1)
        right += int((found == labels(few)).sum())
    model.train()
    return 100 * right / (4 * len(layout.named))
