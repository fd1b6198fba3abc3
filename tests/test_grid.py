"""Places of tokens against a walk over every token of the image."""

import random

import pytest
import torch

from xt_kernels import RegionGrid


def sequence(grid, chunk, stride, order):
    """(row, column, region) of every token of the chunk in sequence order, one token at a time."""
    rows, cols = grid.token_shape(stride)
    side = grid.region // stride
    tokens = [
        (i, j, i // side * grid.cols + j // side)
        for i in range(rows)
        for j in range(cols)
        if i // side * grid.cols + j // side in chunk
    ]
    if order == "tile":
        tokens.sort(key=lambda token: chunk.index(token[2]))  # stable: row-major inside a region
    return tokens


@pytest.mark.parametrize("order", ["row", "tile"])
@pytest.mark.parametrize("seed", range(12))
def test_every_token_has_its_place(seed, order):
    rng = random.Random(seed)
    stride = rng.choice([1, 2, 3, 4])
    grid = RegionGrid(rng.randint(1, 60), rng.randint(1, 60), stride * rng.randint(1, 5))
    regions = list(range(grid.num_regions))
    chunk = None
    if seed % 3:
        rng.shuffle(regions)
        chunk = regions = regions[: rng.randint(1, len(regions))]
    placement = grid.placement(chunk, stride, order)
    expected = sequence(grid, regions, stride, order)
    assert placement.length == len(expected)
    assert list(placement.slots) == regions
    found = {}
    for region, slot in placement.slots.items():
        start, pitch, height, width, row, col = placement.table[slot].tolist()
        for i in range(height):
            for j in range(width):
                place = start + i * pitch + j
                assert place not in found
                found[place] = (row + i, col + j, region)
    assert [found[place] for place in range(len(expected))] == expected


def test_boxes_cover_every_pixel_once():
    grid = RegionGrid(13, 22, 5)
    assert (grid.rows, grid.cols, grid.num_regions) == (3, 5, 15)
    seen = torch.zeros(13, 22, dtype=torch.int64)
    for region in range(grid.num_regions):
        top, left, height, width = grid.box(region)
        seen[top : top + height, left : left + width] += 1
    assert (seen == 1).all()


def test_one_pixel():
    grid = RegionGrid(1, 1, 256)
    placement = grid.placement(None, 32)
    assert grid.box(0) == (0, 0, 1, 1) and grid.token_shape(32) == (1, 1)
    assert placement.table.tolist() == [[0, 1, 1, 1, 0, 0]] and placement.length == 1


def test_an_empty_chunk_has_no_tokens():
    for order in ("row", "tile"):
        placement = RegionGrid(9, 9, 4).placement([], 2, order)
        assert placement.length == 0 and placement.table.shape == (0, 6)


def test_places_are_int64_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        placement = RegionGrid(77, 31, 8).placement([3, 1], 4)
    assert placement.table.device.type == "cpu" and placement.table.dtype == torch.int64
    # 2**16 x 2**16 regions of 256 tokens: 2**40 tokens, past int32.
    grid = RegionGrid(2**24, 2**24, 2**8)
    start = grid.placement([0, 2**16 - 1, 2**32 - 1], 2**4, "row").table[:, 0].tolist()
    assert start == [0, 16, 512]


def test_large_image_places_without_a_walk():
    grid = RegionGrid(29_000, 25_000, 256)
    placement = grid.placement(None, 32)
    assert grid.num_regions == 114 * 98 and placement.length == 907 * 782


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RegionGrid(0, 4, 4), "RegionGrid: height must be at least 1 pixel, got 0."),
        (lambda: RegionGrid(4.0, 4, 4), "RegionGrid: height must be an integer, got 4.0."),
        (lambda: RegionGrid(4, 4, "4"), "RegionGrid: region must be an integer, got '4'."),
        (lambda: RegionGrid(4, -1, 4), "RegionGrid: width must be at least 1 pixel, got -1."),
        (lambda: RegionGrid(4, 4, 0), "RegionGrid: region must be at least 1 pixel, got 0."),
        (lambda: RegionGrid(9, 9, 4).box(9), r"index must be in \[0, 9\), got 9."),
        (lambda: RegionGrid(9, 9, 4).token_shape(3), "divide the region side 4, got 3."),
        (lambda: RegionGrid(9, 9, 4).placement(None, 8), "divide the region side 4, got 8."),
        (lambda: RegionGrid(9, 9, 4).placement(None, 2, "z"), "'row' or 'tile', got 'z'."),
        (lambda: RegionGrid(9, 9, 4).placement([0, 9], 2), r"in \[0, 9\), got 9."),
        (lambda: RegionGrid(9, 9, 4).placement([4, 4], 2), "distinct region numbers, got 4 twice."),
    ],
)
def test_refusals_name_rule_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
