"""The paper's ablations (tables 5a, 5b, 5c and 6) on the images of cue-digits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import cue_digits
from .cue_digits import BATCH, CEILING, METRIC, METRICS, SIDE, STEPS, Row, check, settings
from .curve import Point

__all__ = ["BATCH", "CEILING", "METRIC", "METRICS", "STEPS", "check", "settings"]

NAME = "ablate"

ABLATIONS = {
    "encoder": ("vit", "64/32", "mamba"),
    "depth": ("depth-1", "64/32", "depth-4"),
    "resolution": ("downsampled", "32/32", "64/32"),
    "locality": ("whole", "64/32", "64/16"),
}
"""Name -> rows."""

ROWS = {name: cue_digits.ROWS[name] for name in ("downsampled", "32/32", "64/32", "mamba")} | {
    "vit": Row("attention, not causal", causal=False),
    "depth-1": Row("64/32, context encoder of 1 layer", depth=1),
    "depth-4": Row("64/32, context encoder of 4 layers", depth=4),
    "whole": Row("the image as one region, no context", context=False, side=SIDE),
    "64/16": Row("64/16, context over 16 smaller regions", side=16, chunk=16),
}


def train(row: str, seed: int, steps: int = STEPS, **options: Any) -> Iterator[Point]:
    """As `cue_digits.train`."""
    return cue_digits.train(ROWS[row], seed, steps, **options)
