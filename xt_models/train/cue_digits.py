"""Cue-lookup digits: an image whose label is in one region, and which region is in another.

Three of the four 32 px regions of a 64 px image hold a real 8x8 digit (scikit-learn's
`load_digits`), the fourth a cue that names one of the three; the label is the named digit. All four
are enlarged twice, lie in the middle of their region and ride a carrier, `pixel = signal *
(-1)^(row + column)`: a 2x2 mean is exactly zero, so a down-sampled image is blank.

Ceilings, for digits drawn independently and uniformly from ten classes and a target uniform among
the three, whatever the model computes:

    down-sampled       1/10                              = 10.0 %
    one digit region   1/3 + 2/3 * 1/10                  = 40.0 %  (the target, or another like it)
    a bag of regions   E[most equal digits] / 3
                       = (.72 * 1 + .27 * 2 + .01 * 3)/3 = 43.0 %

A bag is the regions without their places: every assignment of the same three digits to the three
places is then the same input, and over those assignments the label is each digit equally often.
.72, .27 and .01 are the chances of three different digits, of a pair and of three alike. The
test set holds all assignments, so the 43.0 % bound holds on it exactly, not only on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from xt_kernels import RegionGrid, extract_regions, stitch_regions

from ..context_encoder import ContextEncoder, Memory
from ..grid import walk
from ..heads import ClassificationHead, PlainHead
from ..host import need
from ..mamba import MambaContextEncoder
from .curve import CLIP, LEARNING_RATE, WARM_UP, Point, learn
from .digits import CLASSES, Digits, carried, cues, load, pick

NAME, METRIC, METRICS = "cue-digits", "accuracy", "accuracies"
SIDE, REGION = 64, 32
GRID = RegionGrid(SIDE, SIDE, REGION)
DIM, DEPTH, HEADS = 64, 2, 2
BATCH, STEPS, EVALUATE_EVERY = 64, 1000, 200
TEST_SEED, TEST_COPIES = 1, 3


@dataclass(frozen=True)
class Row:
    """One line of the table: what the model sees, and how its regions meet.

    view: "image"; "region", one that holds a digit; "small", the image down-sampled to 32 px.
    context: mix tokens with a context encoder; else their mean goes to the head.
    chunk: regions a chunk of the context encoder; the class tokens of all chunks are averaged.
    mixer: "attention" or "mamba".
    memory: None, or the `gradient` of the memory that each chunk passes to the next ones.
    position: tokens know their place in the "image", or in their "region" only.
    depth, causal: of the context encoder. side: of the regions that are encoded, pixels.
    each: weight of the mean loss of each chunk's own prediction, added to that of their average.
    learning_rate: at its highest.
    ceiling: highest possible accuracy, in percent; None where nothing bounds it.
    """

    title: str
    view: str = "image"
    context: bool = True
    chunk: int = 4
    mixer: str = "attention"
    memory: str | None = None
    position: str = "image"
    depth: int = DEPTH
    causal: bool = True
    side: int = REGION
    each: float = 0.0
    learning_rate: float = LEARNING_RATE
    ceiling: float | None = None


MAMBA: dict[str, Any] = {"mixer": "mamba", "learning_rate": 1e-2}
ROWS = {
    "downsampled": Row("down-sampled, no context", "small", context=False, ceiling=10.0),
    "32/32": Row("32/32, context over the one region", "small", chunk=1, ceiling=10.0),
    "one-region": Row("one region", "region", context=False, ceiling=40.0),
    "bag": Row("all regions pooled, no context", context=False, ceiling=43.0),
    "64/32": Row("64/32, context over all regions"),
    "xl-no-memory": Row("XL, no memory carried", chunk=1, position="region", ceiling=43.0),
    "xl-no-memory-placed": Row("XL, no memory carried, places known", chunk=1),
    "xl-stop": Row("XL, memory, stop-gradient", chunk=1, memory="stop"),
    "xl-through": Row("XL, memory, gradient through it", chunk=1, memory="through"),
    "xl-stop-each": Row(
        "XL, stop-gradient, a loss on each chunk", chunk=1, memory="stop", each=0.5
    ),
    "mamba": Row("Mamba over all regions", **MAMBA),
    "mamba-no-state": Row(
        "Mamba, no state carried", chunk=1, position="region", ceiling=43.0, **MAMBA
    ),
    "mamba-stop": Row("Mamba, state, stop-gradient", chunk=1, memory="stop", **MAMBA),
    "mamba-through": Row("Mamba, state, gradient through it", chunk=1, memory="through", **MAMBA),
    "mamba-through-each": Row(
        "Mamba, gradient through its state, a loss on each chunk",
        chunk=1,
        memory="through",
        each=0.5,
        **MAMBA,
    ),
}
CEILING = "ceiling of a bag of regions, 43 %", 43.0


class Layout(NamedTuple):
    """Which digit goes where in B images.

    digits: numbers of the images `[B, 3]`, for the regions but the cue's, row-major; label `[B]`.
    cue: its region `[B]`; named: the region that it names `[B]`; seen: the slot of `digits` `[B]`
        that a model with view "region" is shown.
    """

    digits: torch.Tensor
    label: torch.Tensor
    cue: torch.Tensor
    named: torch.Tensor
    seen: torch.Tensor


def check() -> None:
    """Raises ValueError, with the way to install it, if scikit-learn is missing."""
    need(NAME, "sklearn", "scikit-learn", "train")


def settings() -> dict[str, Any]:
    """What all runs share, for the record."""
    return {
        "batch": BATCH, "warm_up": WARM_UP, "clip": CLIP,
        "dim": DIM, "depth": DEPTH, "heads": HEADS, "test_images": 2000 * TEST_COPIES,
    }  # fmt: skip


def draw(digits: Digits, batch: int, generator: torch.Generator) -> Layout:
    """A random layout of `batch` images, all choices uniform and independent."""

    def choose(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, (batch, *shape), generator=generator)

    classes = choose(CLASSES, 3)
    cue, target = choose(4), choose(3)
    return Layout(
        digits=pick(digits, classes, generator),
        label=classes.gather(1, target[:, None])[:, 0],
        cue=cue,
        named=slots(cue).gather(1, target[:, None])[:, 0],
        seen=choose(3),
    )


def balanced_layout(digits: Digits, copies: int = TEST_COPIES) -> Layout:
    """`2000 * copies` images in which every ordered triple of classes comes equally often.

    Whenever an image is there, so are those with its digits in every other order: hence the exact
    43.0 %. "seen" is the target in a third of the images: hence 40.0 %.
    """
    generator = torch.Generator().manual_seed(TEST_SEED)

    def choose(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    orders = torch.tensor(list(permutations(range(3))))
    columns: list[list[torch.Tensor]] = []
    for copy in range(copies):
        for classes in combinations_with_replacement(range(CLASSES), 3):
            kinds = len(set(classes))
            # Six orders hold each ordered triple of classes once, twice or, all alike, six times.
            for _ in range(2 if kinds == 3 else 1):
                order = orders[:2] if kinds == 1 else orders
                n = len(order)
                triple = torch.tensor(classes)
                picked = pick(digits, triple, generator)
                cue, target = choose(4, 1).expand(n), choose(3, 1).expand(n)
                place = slots(cue)  # [n, 3]
                columns.append(
                    [
                        picked[order],
                        triple[order].gather(1, target[:, None])[:, 0],
                        cue,
                        place.gather(1, target[:, None])[:, 0],
                        (target + copy) % 3,
                    ]
                )
    return Layout(*(torch.cat(parts) for parts in zip(*columns, strict=True)))


def slots(cue: torch.Tensor) -> torch.Tensor:
    """The three regions without the cue's `[B]`, in row-major order: `[B, 3]`."""
    places = torch.arange(3)
    return places + (places >= cue[:, None])


def render(digits: Digits, layout: Layout) -> torch.Tensor:
    """The images of a layout, `[B, 1, 64, 64]`."""
    batch, where = len(layout.label), torch.arange(len(layout.label))
    patches = torch.empty(batch, 4, 8, 8)
    patches[where[:, None], slots(layout.cue)] = digits.images[layout.digits]
    patches[where, layout.cue] = cues()[layout.named]
    signal = F.pad(patches, (4, 4, 4, 4)).view(batch, 2, 2, 16, 16)  # [B, row, column, 16, 16]
    signal = signal.transpose(2, 3).reshape(batch, 1, SIDE // 2, SIDE // 2)
    return carried(signal, 2)


class CueDigits(nn.Module):
    """The model of a row: conv encoder (stride 8), context encoder or mean, head."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=4),
            nn.BatchNorm2d(32),
            nn.GELU(),
            nn.Conv2d(32, DIM, 3, stride=2, padding=1),
            nn.BatchNorm2d(DIM),
            nn.GELU(),
            nn.Conv2d(DIM, DIM, 3, padding=1),
            nn.BatchNorm2d(DIM),
            nn.GELU(),
        )
        self.context: ContextEncoder | MambaContextEncoder | None = None
        if row.mixer == "mamba":
            self.context = MambaContextEncoder(
                DIM, row.depth, carry=row.memory is not None, gradient=row.memory or "stop"
            )
        elif row.context:
            self.context = ContextEncoder(
                DIM,
                row.depth,
                HEADS,
                attention="exact",
                memory_chunks=0 if row.memory is None else GRID.num_regions - 1,
                gradient=row.memory or "stop",
                causal=row.causal,
            )
        if row.context:
            self.class_token = nn.Parameter(torch.empty(1, 1, DIM).normal_(std=0.02))
        self.head = (ClassificationHead if row.context else PlainHead)(DIM, CLASSES)

    def forward(self, images: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """images `[B, 1, 64, 64]`, seen `[B]` (a region number) -> logits `[B, 10]`, and those that
        each chunk gives alone, `[B, chunks, 10]`.
        """
        grid = RegionGrid(SIDE, SIDE, self.row.side)
        if self.row.view == "small":
            images, grid = F.avg_pool2d(images, 2), RegionGrid(REGION, REGION, REGION)
        regions = extract_regions(images, grid, dtype=images.dtype)  # [B, R, 1, s, s]
        if self.row.view == "region":
            regions = regions[torch.arange(len(seen)), seen][:, None]
        features = self.encoder(regions.flatten(0, 1))
        features = features.view(*regions.shape[:2], *features.shape[1:])  # [B, R, C, t, t]
        chunks = self._mix(features, grid) if self.context else features.mean((1, 3, 4))[:, None]
        return self.head(chunks.mean(1)), self.head(chunks)

    def _mix(self, features: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
        """Class token of each chunk, `[B, chunks, C]`, of features `[B, R, C, t, t]`."""
        assert self.context is not None
        memory: Memory | None = None
        class_tokens = []
        for step in walk(grid, self.row.chunk):
            part = features[:, list(step.regions)]
            if self.row.position == "image":
                tokens = stitch_regions(part, grid, regions=step.regions, chunk=step.regions)
            else:
                tokens = stitch_regions(part, RegionGrid(REGION, REGION, REGION))
            token = self.class_token.expand(len(tokens), -1, -1)
            tokens, memory = self.context(torch.cat([tokens, token], 1), memory)
            class_tokens.append(tokens[:, -1])
        return torch.stack(class_tokens, 1)


def train(
    row: str | Row,
    seed: int,
    steps: int = STEPS,
    *,
    copies: int = TEST_COPIES,
    on_steps: Callable[[int], object] = lambda steps: None,
) -> Iterator[Point]:
    """Trains the model of a row (or its name) and yields its curve; the last point is the result.

    seed: of the weights and the training images; the global generators are left as they were.
    steps: batches of 64 images. copies: of the test set's 2,000 images. on_steps: called with the
        steps just done. How it trains: `curve.learn`.
    """
    row = ROWS[row] if isinstance(row, str) else row
    digits, unseen = load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CueDigits(row)
    generator = torch.Generator().manual_seed(seed)
    test = balanced_layout(unseen, copies)

    def loss() -> torch.Tensor:
        layout = draw(digits, BATCH, generator)
        logits, chunks = model(render(digits, layout), seen_region(layout))
        found = F.cross_entropy(logits, layout.label)
        if row.each:
            label = layout.label.repeat_interleave(chunks.shape[1])
            found = found + row.each * F.cross_entropy(chunks.flatten(0, 1), label)
        return found

    def score() -> float:
        return accuracy(model, unseen, test)

    yield from learn(model, loss, score, steps, EVALUATE_EVERY, on_steps, row.learning_rate)


def seen_region(layout: Layout) -> torch.Tensor:
    """The region `[B]` that a model with view "region" is shown."""
    return slots(layout.cue).gather(1, layout.seen[:, None])[:, 0]


@torch.no_grad()
def accuracy(model: CueDigits, digits: Digits, layout: Layout) -> float:
    """Percent of the images of a layout whose label the model finds."""
    right = 0
    model.eval()
    for start in range(0, len(layout.label), 500):
        part = Layout(*(column[start : start + 500] for column in layout))
        logits, _ = model(render(digits, part), seen_region(part))
        right += int((logits.argmax(1) == part.label).sum())
    model.train()
    return 100 * right / len(layout.label)
