"""The order in which regions are visited and the chunks they form. Integers only."""

from __future__ import annotations

from typing import Literal, NamedTuple

from xt_kernels.regions import RegionGrid

Tiling = Literal["row", "zigzag", "two-stream"]
TILINGS: tuple[Tiling, ...] = ("row", "zigzag", "two-stream")


class Step(NamedTuple):
    """One chunk of the walk: its region numbers in visiting order, and whether its tokens are kept.

    A step with `emit=False` only fills the memory of the context encoder.
    """

    regions: tuple[int, ...]
    emit: bool


def visit_order(grid: RegionGrid, tiling: Tiling) -> list[int]:
    """Every region number once: row-major, or with every second row reversed for "zigzag"."""
    if tiling not in TILINGS:
        raise ValueError(
            f"visit_order: tiling must be one of {', '.join(TILINGS)}, got {tiling!r}."
        )
    ids = range(grid.num_regions)
    if tiling != "zigzag":
        return list(ids)
    rows = (ids[r * grid.cols : (r + 1) * grid.cols] for r in range(grid.rows))
    return [i for r, row in enumerate(rows) for i in (reversed(row) if r % 2 else row)]


def walk(
    grid: RegionGrid, chunk_regions: int | None, tiling: Tiling = "row", reach: int = 0
) -> list[Step]:
    """The chunks of an image in the order of the walk.

    chunk_regions: regions a chunk; the last chunk may be shorter. None is the whole image.
    tiling: "row", "zigzag", or "two-stream": a first pass fills the memory, so that early chunks
        see late ones, then a second pass in row order gives the tokens.
    reach: how many chunks back the memory can see. The first pass of "two-stream" visits the last
        `reach` chunks only: what lies further back cannot change the memory at its end.
    """
    if chunk_regions is not None and chunk_regions < 1:
        raise ValueError(f"walk: chunk_regions must be at least 1, got {chunk_regions}.")
    order = visit_order(grid, tiling)
    size = len(order) if chunk_regions is None else chunk_regions
    chunks = [tuple(order[i : i + size]) for i in range(0, len(order), size)]
    steps = [Step(chunk, True) for chunk in chunks]
    if tiling == "two-stream" and reach:
        steps = [Step(chunk, False) for chunk in chunks[-reach:]] + steps
    return steps
