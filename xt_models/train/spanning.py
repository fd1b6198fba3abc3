"""Spanning objects: bars and rings so tall that no region sees enough of one to say its box.

A scene of 4 x 8 regions of 32 px shows speckle and one object, about three regions tall and wide:
a bar, the diagonal of its box, or a ring, the ellipse in it. Haze lies over the middle two rows of
regions, so an object is seen at its top and at its bottom only. The FCOS head sees each region
alone, and says the boxes with their centre there; what else it knows comes from context. A map of
the boxes' insides is learned beside them. The measure is AP50, COCO's average precision at IoU 0.5,
of the best box of each class in a scene (its `maxDets` = 1).

Ceiling, for any model that says boxes centred in the middle rows from the pixels of one region, or
of one row of regions. The test set holds fours of scenes with the same speckle: bar and ring in one
box, and both mirrored, left and right.

    1. The middle rows show speckle alone, the same in all four. So the best box of a class that is
       centred there is the same one in all four.
    2. A box centred in the top row lies inside the scene, and so ends above its middle: with an
       object from y0 to y1 its IoU is below (64 - y0) / y1. Objects are placed so that this is less
       than 1/2; at the bottom likewise. Only boxes centred in the middle rows can be right.
    3. A box and its mirror image are disjoint with a gap, so no box has IoU 1/2 with both, and the
       best box of a class is right in at most one of the four scenes. Where it is right with score
       s, the best box of each other scene has a score of at least s and is wrong.

So n boxes that are right come with at least 3 (n - 1) wrong ones before the last of them, however
ties fall: precision is at most n / (4 n - 3), recall at most 1/2. `ceiling` adds this up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..heads import Head
from ..heads.boxes import Boxes
from ..host import need
from ..metrics import coco_map
from ..model import XT, XTConfig
from .curve import CLIP, LEARNING_RATE, WARM_UP, Point, learn
from .shoreline import ROWS as SHORELINE_ROWS
from .shoreline import Row, speckle

NAME, METRIC, METRICS = "spanning", "ap50", "ap50s"
REGION, ROWS_OF_REGIONS, COLS_OF_REGIONS, CELL = 32, 4, 8, 16
HEIGHT, WIDTH = ROWS_OF_REGIONS * REGION, COLS_OF_REGIONS * REGION
CLASSES = ("bar", "ring")
STROKE = 8
ENCODER, DIM, DEPTH, HEADS, BOX_DIM = "test_mambaout", 64, 2, 2, 64
BATCH, STEPS, EVALUATE_EVERY = 8, 400, 200
TEST_SEED, TEST_FOURS = 1, 32


def ceiling(fours: int) -> float:
    """The highest AP50, in percent, of a test set of so many fours, for models as told above.

    COCO averages, over recalls of 0, 0.01, .. 1, the best precision at that recall or beyond. Each
    class has `2 * fours` objects, of which `fours` can be found.
    """
    found = [max(math.ceil(2 * fours * i / 100), 1) for i in range(51)]
    return 100 * sum(n / (4 * n - 3) for n in found) / 101


CHANCE = ceiling(TEST_FOURS)
CEILING = f"ceiling without context, {CHANCE:.1f} %", CHANCE


# Those of shoreline, without the windows that reach beyond a region.
ROWS = {
    name: replace(row, ceiling=None if row.ceiling is None else CHANCE)
    for name, row in SHORELINE_ROWS.items()
    if not row.margin
}


class Layout(NamedTuple):
    """B scenes: kind, number of the class `[B]`; box (left, top, right, bottom) `[B, 4]`, pixels;
    falls, whether a bar falls from left to right, bool `[B]`; speckle, seeds `[B]`.
    """

    kind: torch.Tensor
    box: torch.Tensor
    falls: torch.Tensor
    speckle: torch.Tensor


def check() -> None:
    """Raises ValueError, with the way to install it, if pycocotools is missing."""
    need(NAME, "pycocotools", "pycocotools", "train")


def settings() -> dict[str, Any]:
    """What all runs share, for the record."""
    return {
        "batch": BATCH, "learning_rate": LEARNING_RATE, "warm_up": WARM_UP, "clip": CLIP,
        "encoder": ENCODER, "dim": DIM, "depth": DEPTH, "heads": HEADS, "box_dim": BOX_DIM,
        "test_images": 4 * TEST_FOURS,
    }  # fmt: skip


def draw(fours: int, generator: torch.Generator) -> Layout:
    """Random scenes, four of each: bar left, bar right, ring left, ring right."""

    def random(low: int | torch.Tensor, high: int | torch.Tensor) -> torch.Tensor:
        """Integers in [low, high)."""
        share = torch.rand(fours, generator=generator)
        return low + (share * (high - low)).long()

    width = random(88, 113)
    left = random(4, WIDTH // 2 - 3 - width)
    top, bottom = random(10, 20), HEIGHT - random(10, 20)
    box = torch.stack([left, top, left + width, bottom], 1)
    mirrored = torch.stack([WIDTH - left - width, top, WIDTH - left, bottom], 1)
    falls = torch.rand(fours, generator=generator) < 0.5
    return Layout(
        torch.tensor([0, 0, 1, 1]).repeat(fours),
        torch.stack([box, mirrored] * 2, 1).flatten(0, 1).float(),
        torch.stack([falls, ~falls] * 2, 1).flatten(),
        torch.randint(1 << 40, (fours,), generator=generator).repeat_interleave(4),
    )


def render(layout: Layout) -> torch.Tensor:
    """The scenes of a layout, `[B, 1, 128, 256]`."""
    left, top, right, bottom = layout.box[:, :, None, None].unbind(1)
    half_width, half_height = (right - left) / 2, (bottom - top) / 2
    x = torch.arange(WIDTH) + 0.5 - (left + right) / 2  # [B, 1, W], from the centre of the box
    y = torch.arange(HEIGHT)[:, None] + 0.5 - (top + bottom) / 2  # [B, H, 1]
    slope = torch.where(layout.falls, 1.0, -1.0)[:, None, None]
    across = (x * half_height - slope * y * half_width).abs() / half_width.hypot(half_height)
    is_bar = (across < STROKE / 2) & (x.abs() < half_width) & (y.abs() < half_height)
    inner_width, inner_height = half_width - STROKE, half_height - STROKE
    is_ring = (x / half_width).square() + (y / half_height).square() < 1
    is_ring &= (x / inner_width).square() + (y / inner_height).square() > 1
    object_ = torch.where((layout.kind == 0)[:, None, None], is_bar, is_ring)
    object_[:, REGION:-REGION] = False  # haze
    return speckle(layout.speckle, HEIGHT, WIDTH) + object_[:, None]


def boxes(layout: Layout) -> list[Boxes]:
    """The object of each scene."""
    return [
        {"boxes": box[None], "labels": kind[None]}
        for box, kind in zip(layout.box, layout.kind, strict=True)
    ]


def inside(layout: Layout) -> torch.Tensor:
    """The cells of 16 x 16 px in the box of a bar, and of a ring, bool `[B, 2, 8, 16]`."""
    left, top, right, bottom = layout.box[:, :, None].unbind(1)
    x = torch.arange(WIDTH // CELL) * CELL + CELL / 2
    y = torch.arange(HEIGHT // CELL) * CELL + CELL / 2
    is_in = ((y > top) & (y < bottom))[:, :, None] & ((x > left) & (x < right))[:, None]
    is_kind = layout.kind[:, None] == torch.arange(len(CLASSES))
    return is_in[:, None] & is_kind[:, :, None, None]


def build(row: Row) -> XT:
    """The model of a row, with two heads: "boxes", and "map" for the insides of boxes."""
    heads: dict[str, Any] = {
        "boxes": {"kind": "fcos", "classes": len(CLASSES), "dim": BOX_DIM, "group": 1,
                  "overlap": 0, "min_stride": CELL, "score_threshold": 0.0},
        "map": {"kind": "dense", "classes": len(CLASSES), "loss": "bce", "output_stride": CELL,
                "pos_weight": 2.0},
    }  # fmt: skip
    shared: dict[str, Any] = {
        "encoder": ENCODER, "region": REGION, "in_chans": 1, "dim": DIM, "depth": DEPTH,
        "num_heads": HEADS, "residual": row.config["context"] is not None,
        "chunk_regions": ROWS_OF_REGIONS * COLS_OF_REGIONS // row.chunks, "heads": heads,
    }  # fmt: skip
    return XT(XTConfig(**shared | row.config))


@torch.no_grad()
def predict(model: XT, layout: Layout) -> list[Boxes]:
    """The boxes that the model says in all scenes of a layout, in evaluation mode."""
    model.eval()
    found: list[Boxes] = []
    for part in zip(*(torch.split(column, 32) for column in layout), strict=True):
        found += _head(model, "boxes").predict(model(render(Layout(*part))).heads["boxes"])
    model.train()
    return found


def ap50(found: list[Boxes], layout: Layout) -> float:
    """COCO's average precision at IoU 0.5 of the best box of each class in a scene, in percent."""
    return 100 * coco_map(found, boxes(layout), max_boxes=1)["mAP50"]


def train(
    name: str,
    seed: int,
    steps: int = STEPS,
    *,
    on_steps: Callable[[int], object] = lambda steps: None,
) -> Iterator[Point]:
    """Trains the model of row `name` and yields its curve; the last point is the result.

    seed: of the weights and the training scenes; the global generators are left as they were.
    steps: batches of 8 scenes, two fours. on_steps: called with the steps just done. How it trains:
        `curve.learn`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(ROWS[name])
    generator = torch.Generator().manual_seed(seed)
    test = draw(TEST_FOURS, torch.Generator().manual_seed(TEST_SEED))

    def loss() -> torch.Tensor:
        layout = draw(BATCH // 4, generator)
        out = model(render(layout)).heads
        found = _head(model, "boxes").loss(out["boxes"], boxes(layout))
        return found + _head(model, "map").loss(out["map"], inside(layout))

    def score() -> float:
        return ap50(predict(model, test), test)

    yield from learn(model, loss, score, steps, EVALUATE_EVERY, on_steps)


def _head(model: XT, name: str) -> Head:
    head = model.heads[name]
    assert isinstance(head, Head)
    return head
