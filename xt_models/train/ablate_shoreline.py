"""The paper's ablations (tables 5a, 5b and 6) on the scenes of shoreline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import shoreline
from .curve import Point
from .shoreline import BATCH, CEILING, METRIC, METRICS, REGION, REGIONS, STEPS, Row, check, settings

__all__ = ["BATCH", "CEILING", "METRIC", "METRICS", "STEPS", "check", "settings"]

NAME = "ablate-shoreline"

ABLATIONS = {
    "encoder": ("whole", "xl-through", "mamba"),
    "depth": ("depth-1", "whole", "depth-4"),
    "locality": ("one-region", "half", "whole"),
}
"""Name -> rows."""

ROWS = {name: shoreline.ROWS[name] for name in ("whole", "xl-through")} | {
    "mamba": Row(
        "Mamba, two-stream, gradient through its state",
        {"context": "mamba", "tiling": "two-stream", "gradient": "through"},
        chunks=4,
    ),
    "depth-1": Row("context encoder of 1 layer", {"context": "vit", "depth": 1}),
    "depth-4": Row("context encoder of 4 layers", {"context": "vit", "depth": 4}),
    "one-region": Row(
        "the scene as one region, no context", {"context": None, "region": REGION * REGIONS}
    ),
    "half": Row("context over regions twice as large", {"context": "vit", "region": 2 * REGION}),
}


def train(row: str, seed: int, steps: int = STEPS, **options: Any) -> Iterator[Point]:
    """As `shoreline.train`."""
    return shoreline.train(ROWS[row], seed, steps, **options)
