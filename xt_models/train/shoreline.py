"""Shoreline vessels: whether a bright dot is a vessel, a coast at least one region away says.

A radar scene of 4 x 4 regions of 32 px, or of more, shows speckle and equal bright dots. In one of
the four regions in the middle the coast is seen, land around a bay that opens to one of four
quadrants (NW, NE, SW, SE of that region's centre); haze hides it everywhere else. A dot is a vessel
if it lies in the quadrant of the bay. Dots keep away from the rows and columns of the coast's
region, and from all regions that touch it. A model scores each cell of 16 x 16 px and calls those
above a threshold, chosen on a validation set, vessels; the measure is F1 of cells, 2 TP / (2 TP +
FP + FN). Which cells are sea is learned beside it, from the same head.

Chance level, for any model whose score at a dot depends on no pixel of the coast's region: one that
sees the dot's region, or more around it up to the next region, or other regions of its row. The
test set holds each scene four times, alike but for the quadrant of the bay. So a dot has one score
in all four, and is a vessel in exactly one of them. Of the d dots of a scene let the model call p
vessels; let it call n cells without a dot vessels in the four together. Then over the four

    TP = p    FP = 3 p + n    FN = d - p        F1 = 2 p / (4 p + n + d) <= 2/5

with equality where all dots and nothing else are called vessels. The counts of scenes add up and so
does the bound: 40.0 % is the best on this test set exactly, and calling every dot a vessel gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..heads.dense import DenseHead
from ..model import XT, XTConfig
from .curve import CLIP, LEARNING_RATE, WARM_UP, Point, learn

NAME, METRIC, METRICS = "shoreline", "f1", "f1s"
REGION, REGIONS, CELL = 32, 4, 16
SPECKLE = 0.1
ENCODER, DIM, DEPTH, HEADS = "test_mambaout", 64, 2, 2
BATCH, STEPS, EVALUATE_EVERY = 32, 100, 50
POSITIVE_WEIGHT = 4.0
VALIDATION_SEED, TEST_SEED = 1, 2
VALIDATION_SCENES, TEST_SCENES = 32, 128
CHANCE = 100 * 2 / 5
CEILING = f"chance level without the coast, {CHANCE:.0f} %", CHANCE


@dataclass(frozen=True)
class Row:
    """One line of the table: settings of `XTConfig` on top of those that all rows share.

    chunks: of the context encoder, each a quarter of the scene or all of it.
    margin: pixels by which the window of each region reaches into its neighbours; such windows are
        encoded alone and keep the cells of their region.
    ceiling: highest possible F1 in scenes of 4 x 4 regions, in percent; None where nothing bounds
        it.
    """

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    chunks: int = 1
    margin: int = 0
    ceiling: float | None = None


_XL = {"context": "xl", "memory_chunks": 3, "tiling": "two-stream"}
ROWS = {
    "region-only": Row("each region alone", {"context": None}, ceiling=CHANCE),
    "overlap": Row(
        "windows of 64 px, half of it overlap", {"context": None}, margin=16, ceiling=CHANCE
    ),
    "no-memory": Row(
        "context in chunks of a row, no memory", {"context": "vit"}, chunks=4, ceiling=CHANCE
    ),
    "whole": Row("context over all regions", {"context": "vit"}),
    "xl-stop": Row("XL, two-stream, stop-gradient", _XL, chunks=4),
    "xl-through": Row(
        "XL, two-stream, gradient through memory", _XL | {"gradient": "through"}, chunks=4
    ),
}


class Layout(NamedTuple):
    """B scenes: coast, the region (row, column) where it is seen `[B, 2]`; bay, its quadrant `[B]`,
    0 to 3 for NW, NE, SW, SE; dots, their cells (row, column) `[B, D, 2]`; speckle, seeds `[B]`.
    """

    coast: torch.Tensor
    bay: torch.Tensor
    dots: torch.Tensor
    speckle: torch.Tensor


def check() -> None:
    """Raises ValueError if something that training needs is missing: nothing is."""


def settings(regions: int = REGIONS) -> dict[str, Any]:
    """What all runs share, for the record."""
    batch, validation, test = (4 * number for number in _numbers(regions))
    return {
        "batch": batch, "learning_rate": LEARNING_RATE, "warm_up": WARM_UP, "clip": CLIP,
        "encoder": ENCODER, "dim": DIM, "depth": DEPTH, "heads": HEADS,
        "test_images": test, "validation_images": validation, "regions": regions,
    }  # fmt: skip


def _numbers(regions: int) -> list[int]:
    """Scenes of a batch, of the validation and the test set, each with four bays: fewer where they
    are larger."""
    fewer = (regions // REGIONS) ** 2
    return [max(2, number // fewer) for number in (BATCH // 4, VALIDATION_SCENES, TEST_SCENES)]


def draw(scenes: int, generator: torch.Generator, regions: int = REGIONS) -> Layout:
    """Random scenes, each four times, with the bay in each quadrant: `4 * scenes` of them.

    regions: side of the scenes, in regions; they hold 1.5 times as many dots.
    """
    cells = regions * REGION // CELL
    coast = regions // 2 - torch.randint(2, (scenes, 2), generator=generator)
    away = torch.arange(cells) // (REGION // CELL) - coast[..., None]  # [B, 2, cells], in regions
    rows, cols = away[:, 0, :, None].abs(), away[:, 1, None, :].abs()
    free = (rows > 0) & (cols > 0) & (torch.maximum(rows, cols) > 1)  # [B, cells, cells]
    order = torch.rand(free.shape, generator=generator).masked_fill(~free, 2)
    chosen = order.flatten(1).argsort(1)[:, : 3 * regions // 2]
    dots = torch.stack([chosen // cells, chosen % cells], -1)
    speckle = torch.randint(1 << 40, (scenes,), generator=generator)
    four = (t.repeat_interleave(4, 0) for t in (coast, coast, dots, speckle))
    return Layout(*four)._replace(bay=torch.arange(4).repeat(scenes))


def target(layout: Layout, regions: int = REGIONS) -> torch.Tensor:
    """The cells that hold a vessel, and those that are sea, bool `[B, 2, h, w]`."""
    shore = layout.coast * (REGION // CELL) + REGION // CELL // 2  # [B, 2], in cells
    beyond = torch.arange(regions * REGION // CELL) >= shore[..., None]  # south, east of it
    quadrant = 2 * beyond[:, 0, :, None] + beyond[:, 1, None, :]
    sea = quadrant == layout.bay[:, None, None]
    is_dot = torch.zeros_like(sea)
    is_dot[torch.arange(len(sea))[:, None], layout.dots[..., 0], layout.dots[..., 1]] = True
    return torch.stack([sea & is_dot, sea], 1)


def render(layout: Layout, regions: int = REGIONS) -> torch.Tensor:
    """The scenes of a layout, `[B, 1, 32 * regions, 32 * regions]`."""
    side, scene = regions * REGION, torch.arange(len(layout.bay))
    out = speckle(layout.speckle, side, side)
    cells = out.view(-1, side // CELL, CELL, side // CELL, CELL)
    dot = slice(CELL // 4, -CELL // 4)
    cells[scene[:, None], layout.dots[..., 0], dot, layout.dots[..., 1], dot] += 1
    half = torch.arange(REGION) // (REGION // 2)
    is_bay = 2 * half[:, None] + half == layout.bay[:, None, None]
    blocks = out.view(-1, regions, REGION, regions, REGION)
    blocks[scene, layout.coast[:, 0], :, layout.coast[:, 1]] += 1 - 2.0 * is_bay
    return out


def speckle(seeds: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Noise `[B, 1, height, width]`, the same for the same seed `[B]`."""
    different, which = torch.unique(seeds, return_inverse=True)
    generator = torch.Generator()
    noise = [
        torch.randn(1, height, width, generator=generator.manual_seed(seed))
        for seed in different.tolist()
    ]
    return SPECKLE * torch.stack(noise)[which]


def build(row: Row, regions: int = REGIONS) -> XT:
    """The model of a row, with one dense head, "map", for vessels and sea."""
    head = {"kind": "dense", "classes": 2, "loss": "bce", "output_stride": CELL,
            "pos_weight": POSITIVE_WEIGHT}  # fmt: skip
    shared: dict[str, Any] = {
        "encoder": ENCODER, "region": REGION + 2 * row.margin, "in_chans": 1, "dim": DIM,
        "depth": DEPTH, "num_heads": HEADS, "residual": row.config["context"] is not None,
        "chunk_regions": regions**2 // row.chunks, "heads": {"map": head},
    }  # fmt: skip
    return XT(XTConfig(**shared | row.config))


def logits(model: XT, row: Row, images: torch.Tensor) -> torch.Tensor:
    """Logits of the cells `[B, 2, H / 16, W / 16]` of images `[B, 1, H, W]`."""
    margin, side = row.margin, REGION + 2 * row.margin
    if not margin:
        out: torch.Tensor = model(images).heads["map"]
        return out
    windows = F.pad(images, (margin,) * 4).unfold(2, side, REGION).unfold(3, side, REGION)
    rows, cols = windows.shape[2:4]
    out = model(windows.reshape(-1, 1, side, side)).heads["map"]
    cut, inside = margin // CELL, REGION // CELL
    out = out[..., cut : cut + inside, cut : cut + inside]
    out = out.view(-1, rows, cols, 2, inside, inside)
    return out.permute(0, 3, 1, 4, 2, 5).reshape(-1, 2, rows * inside, cols * inside)


@torch.no_grad()
def scores(model: XT, row: Row, layout: Layout, regions: int = REGIONS) -> torch.Tensor:
    """Logits of vessels `[B, h, w]` in all scenes of a layout, the model in evaluation mode."""
    model.eval()
    parts = zip(*(torch.split(column, 32) for column in layout), strict=True)
    out = [logits(model, row, render(Layout(*part), regions))[:, 0] for part in parts]
    model.train()
    return torch.cat(out)


def f1(found: torch.Tensor, true: torch.Tensor) -> float:
    """F1 of cells, in percent; both bool, of one shape."""
    return float(200 * (found & true).sum() / (found.sum() + true.sum()).clamp(min=1))


def best_threshold(scores: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The lowest score that counts as found where F1 is highest."""
    values, order = scores.flatten().sort(descending=True)
    hits = true.flatten()[order].cumsum(0)
    score = 2 * hits / (torch.arange(1, len(values) + 1) + hits[-1])
    score[:-1][values[1:] == values[:-1]] = 0  # equal scores are found together
    return values[score.argmax()]


def train(
    row: str | Row,
    seed: int,
    steps: int = STEPS,
    *,
    regions: int = REGIONS,
    on_steps: Callable[[int], object] = lambda steps: None,
    save: Path | None = None,
) -> Iterator[Point]:
    """Trains the model of a row (or its name) and yields its curve; the last point is the result.

    seed: of the weights and the training scenes; the global generators are left as they were.
    steps: batches of 8 scenes, each with the four bays. regions: side of the scenes, in regions; a
        batch of large ones is of fewer, at least 2. on_steps: called with the steps just done.
    save: folder for the model, whose logits are then moved so that the threshold is 0. How it
        trains: `curve.learn`.
    """
    name, row = (row, ROWS[row]) if isinstance(row, str) else (row.title, row)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(row, regions)
    head = model.heads["map"]
    assert isinstance(head, DenseHead)
    generator = torch.Generator().manual_seed(seed)
    scenes = _numbers(regions)
    validation = draw(scenes[1], torch.Generator().manual_seed(VALIDATION_SEED), regions)
    test = draw(scenes[2], torch.Generator().manual_seed(TEST_SEED), regions)
    known, true = (target(layout, regions)[:, 0] for layout in (validation, test))
    threshold = torch.tensor(0.0)

    def loss() -> torch.Tensor:
        layout = draw(scenes[0], generator, regions)
        found = logits(model, row, render(layout, regions))
        return head.loss(found, target(layout, regions))

    def score() -> float:
        nonlocal threshold
        threshold = best_threshold(scores(model, row, validation, regions), known)
        return f1(scores(model, row, test, regions) >= threshold, true)

    for point in learn(model, loss, score, steps, EVALUATE_EVERY, on_steps):
        yield point
    if save is not None:
        with torch.no_grad():
            head.proj.bias[: head.scale**2].sub_(threshold)
        command = f"xt train shoreline --rows {name} --steps {steps} --regions {regions} --save"
        origin = f"Made by `{command}`, seed {seed}; F1 {point.score:.1f} % on its test set."
        model.save_pretrained(save, model_card_kwargs={"origin": origin})
