"""`extract_regions` and `stitch_regions`: the definition, the kernels, the public ops."""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import xt_kernels as xk
from xt_kernels import RegionGrid, reference
from xt_kernels.regions import ops
from xt_kernels.regions.reference import normalisation
from xt_kernels.testing import (
    GpuCase,
    assert_no_worse,
    check_mutants,
    honest_interpreter,
    make,
    sparse,
    with_gaps,
)

pytest.importorskip("triton")
from xt_kernels.regions import kernels

pytestmark = pytest.mark.usefixtures("poisoned_empty")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMATS = [torch.contiguous_format, torch.channels_last]
# Regions on the right and lower edge are partly padding; the last one is a corner.
GRID = RegionGrid(13, 21, 8)
SHUFFLED = (5, 0, 4, 2)
MEAN, STD = [0.1, 0.5, -0.2, 1.5, 0.3], [0.2, 0.7, 1.3, 0.5, 2.0]


def numbers(pixel: torch.dtype, channels: int) -> dict:
    """Normalisation that gives values of order one for every pixel type."""
    return {"mean": MEAN[:channels], "std": STD[:channels]}


def picture(shape, pixel, seed=0, device="cpu"):
    """An image and its fp64 copy."""
    return make(shape, pixel, seed, device)


def extract_by_kernel(
    image, grid, regions=None, origin=(0, 0), dtype=torch.float32, last=False, config=None, **norm
):
    """The kernel, on a GPU or interpreted, for an image `[B, C, h, w]`."""
    gain, bias = normalisation(
        image.dtype, image.shape[1], norm.get("mean"), norm.get("std"), norm.get("scale")
    )
    boxes = ops._boxes(grid, regions, *origin).to(image.device)
    inner = torch.promote_types(image.dtype, torch.float32)
    gain, bias = (torch.tensor(v, dtype=inner, device=image.device) for v in (gain, bias))
    out = ops._new_regions(image, boxes.shape[0], grid.region, dtype, last).fill_(math.nan)
    aligned = ops._aligned(grid, origin[1])
    kernels.launch_extract_forward(image, boxes, gain, bias, out, aligned, config)
    return out


def extract_gradient_by_kernel(
    grad, image, grid, regions=None, origin=(0, 0), config=None, out=None, **norm
):
    """The kernel's gradient of an image `[B, C, h, w]`, in the image's layout."""
    gain, _ = normalisation(
        image.dtype, image.shape[1], norm.get("mean"), norm.get("std"), norm.get("scale")
    )
    boxes = ops._boxes(grid, regions, *origin).to(image.device)
    inner = torch.promote_types(image.dtype, torch.float32)
    gain = torch.tensor(gain, dtype=inner, device=image.device)
    out = torch.zeros_like(image) if out is None else out
    aligned = ops._aligned(grid, origin[1])
    kernels.launch_extract_backward(grad, boxes, gain, out, aligned, config)
    return out


def places(grid, side, regions=None, chunk=None, order="row", device="cpu"):
    table, length = ops._places(grid, regions, chunk, grid.region // side, order)
    return table.to(device), length


def stitch_by_kernel(
    features, grid, regions=None, chunk=None, order="row", position=True, dtype=None, config=None
):
    """The kernel, on a GPU or interpreted, for `[B, R, t, t, C]`; NaN where no region writes."""
    device, channels = features.device, features.shape[4]
    table, length = places(grid, features.shape[2], regions, chunk, order, device)
    turns = ops._turns(channels).to(device) if position else None
    out = torch.full(
        (features.shape[0], length, channels),
        math.nan,
        dtype=dtype or features.dtype,
        device=device,
    )
    kernels.launch_stitch_forward(features, table, turns, out, config)
    return out


def stitch_gradient_by_kernel(grad, features, grid, regions=None, chunk=None, order="row", **more):
    table, _ = places(grid, features.shape[2], regions, chunk, order, grad.device)
    out = torch.empty_like(features).fill_(math.nan)
    kernels.launch_stitch_backward(grad, table, out, **more)
    return out


def exact_code(rows, cols, dim):
    """Position code in fp64, without the rounding to fp32 of the definition."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    x, y = cols.double()[:, None] * omega, rows.double()[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


def stitch_truth(features, grid, order="row", **lists):
    """Stitched tokens in fp64 with the fp64 code, for `[B, R, t, t, C]`."""
    where = torch.zeros((*features.shape[1:4], 2), dtype=torch.float64)
    side = features.shape[2]
    ids = lists.get("regions") or lists.get("chunk") or range(grid.num_regions)
    for k, region in enumerate(ids):
        row, col = region // grid.cols * side, region % grid.cols * side
        where[k, ..., 0] = torch.arange(row, row + side)[:, None]
        where[k, ..., 1] = torch.arange(col, col + side)
    code = exact_code(where[..., 0].reshape(-1), where[..., 1].reshape(-1), features.shape[4])
    sums = features + code.reshape(features.shape[1:]).to(features.device)
    return reference.stitch_regions(
        sums, grid, channels_last=True, order=order, position=False, **lists
    )


def maps(shape, dtype, by_planes, seed=0, device="cpu", kind="normal"):
    """Features `[B, R, t, t, C]` (stored `[.., C, t, t]` for by_planes) and their fp64 copy."""
    batch, count, side, _, channels = shape
    if not by_planes:
        return make(shape, dtype, seed, device, kind)
    low, wide = make((batch, count, channels, side, side), dtype, seed, device, kind)
    return low.movedim(2, -1), wide.movedim(2, -1)


# 1. Is the definition right?


def test_the_definition_of_extraction_pixel_by_pixel():
    image, _ = picture((2, 13, 21), torch.uint8)
    out = reference.extract_regions(image, GRID, mean=[0.5, 0.25], std=[0.5, 2.0])
    for region in range(GRID.num_regions):
        for y in range(8):
            for x in range(8):
                row, col = region // 3 * 8 + y, region % 3 * 8 + x
                want = [0.0, 0.0]
                if row < 13 and col < 21:
                    first, second = image[:, row, col].tolist()
                    want = [(first / 255 - 0.5) / 0.5, (second / 255 - 0.25) / 2.0]
                assert out[region, :, y, x].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("order", ["row", "tile"])
def test_the_definition_of_stitching_token_by_token(order):
    features = torch.randn(6, 8, 4, 4)
    tokens = reference.stitch_regions(features, GRID, order=order)
    rows, cols = GRID.token_shape(2)
    where = [(i, j) for i in range(rows) for j in range(cols)]
    if order == "tile":
        where.sort(key=lambda p: p[0] // 4 * GRID.cols + p[1] // 4)
    for place, (i, j) in enumerate(where):
        feature = features[i // 4 * GRID.cols + j // 4, :, i % 4, j % 4]
        w = [10000.0 ** (-k / 2) for k in range(2)]
        code = [math.sin(j * w[0]), math.sin(j * w[1]), math.cos(j * w[0]), math.cos(j * w[1])]
        code += [math.sin(i * w[0]), math.sin(i * w[1]), math.cos(i * w[0]), math.cos(i * w[1])]
        torch.testing.assert_close(tokens[place], feature + torch.tensor(code))


@pytest.mark.parametrize("channels_last", [False, True])
def test_stitching_single_pixels_undoes_extraction(channels_last):
    shape = (2, 13, 21, 3) if channels_last else (2, 3, 13, 21)
    image = torch.randn(shape)
    regions = xk.extract_regions(image, GRID, channels_last=channels_last)
    tokens = xk.stitch_regions(regions, GRID, position=False)
    pixels = image if channels_last else image.movedim(1, -1)
    assert torch.equal(tokens, pixels.reshape(2, 13 * 21, 3))


def test_each_op_and_its_backward_are_adjoint():
    image = torch.randn(1, 3, 13, 21, dtype=torch.float64, requires_grad=True)
    cut = xk.extract_regions(image, GRID, regions=SHUFFLED, std=[2.0, 3.0, 0.5], dtype=image.dtype)
    other = torch.randn_like(cut)
    (grad,) = torch.autograd.grad(cut, image, other)
    torch.testing.assert_close((cut * other).sum(), (image * grad).sum())

    features = torch.randn(1, 4, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    tokens = xk.stitch_regions(features, GRID, regions=SHUFFLED, position=False)
    other = torch.randn_like(tokens)
    (grad,) = torch.autograd.grad(tokens, features, other)
    torch.testing.assert_close((tokens * other).sum(), (features * grad).sum())


# 2. Is the kernel as right as plain PyTorch?

CASES = [
    # pixel, result, stored by pixel, result stored by pixel
    (torch.uint8, torch.bfloat16, False, False),
    (torch.uint8, torch.bfloat16, True, False),
    (torch.uint8, torch.float16, True, True),
    (torch.uint8, torch.float32, False, True),
    (torch.uint16, torch.float32, True, False),
    (torch.float16, torch.float16, True, True),
    (torch.bfloat16, torch.float32, False, False),
    (torch.float32, torch.bfloat16, True, False),
    (torch.float32, torch.float32, False, False),
]


@pytest.mark.parametrize(("pixel", "dtype", "by_pixel", "last"), CASES)
def test_extraction_kernel_is_no_worse_than_eager(honest, device, pixel, dtype, by_pixel, last):
    image, wide = picture((1, 13, 21, 3) if by_pixel else (1, 3, 13, 21), pixel, 0, device)
    if by_pixel:
        image, wide = image.movedim(-1, 1), wide.movedim(-1, 1)
    norm = numbers(pixel, 3)
    scale = {torch.uint8: 1 / 255, torch.uint16: 1 / 65535}.get(pixel, 1.0)
    ours = extract_by_kernel(image, GRID, SHUFFLED, dtype=dtype, last=last, **norm)
    plain = reference.extract_regions(image, GRID, regions=SHUFFLED, dtype=dtype, **norm)
    truth = reference.extract_regions(
        wide, GRID, regions=SHUFFLED, dtype=torch.float64, scale=scale, **norm
    )
    assert_no_worse(ours, plain, truth)


@pytest.mark.parametrize("by_pixel", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_extraction_gradient_kernel_is_no_worse_than_eager(honest, device, dtype, by_pixel):
    image, wide = picture((1, 13, 21, 3) if by_pixel else (1, 3, 13, 21), dtype, 0, device)
    if by_pixel:
        image, wide = image.movedim(-1, 1), wide.movedim(-1, 1)
    grad, wide_grad = make((1, 4, 3, 8, 8), dtype, 1, device)
    norm = numbers(dtype, 3)
    ours = extract_gradient_by_kernel(grad, image, GRID, SHUFFLED, **norm)
    found = []
    for source, output in ((image, grad), (wide, wide_grad)):
        source = source.detach().requires_grad_()
        cut = reference.extract_regions(source, GRID, regions=SHUFFLED, dtype=output.dtype, **norm)
        found.append(torch.autograd.grad(cut, source, output)[0])
    if dtype == torch.float64:
        torch.testing.assert_close(ours, found[1])
    else:
        assert_no_worse(ours, found[0], found[1])


def aligned_picture(channels, by_pixel, batch=2):
    """An image of 20 x 40 and regions of side 8: all strides are multiples of 8."""
    shape = (batch, 20, 40, channels) if by_pixel else (batch, channels, 20, 40)
    image = make(shape, torch.float32, 0)[0]
    return (image.movedim(-1, 1) if by_pixel else image), RegionGrid(20, 40, 8)


@pytest.mark.parametrize("origin", [(0, 0), (8, 8)])
@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("by_pixel", [False, True])
def test_strides_in_units_of_eight(honest, device, monkeypatch, by_pixel, channels, origin):
    """The way of every image whose sides are multiples of 8: several regions from the left edge."""
    whole, grid = aligned_picture(channels, by_pixel)
    ids = (6, 14, 9)  # one is cut by the lower edge
    window = whole.to(device)[:, :, origin[0] :, origin[1] :]
    units = []

    def noted(*arguments):
        strides = strides_in_units(*arguments)
        units.append(strides[-1])
        return strides

    strides_in_units = kernels._strides_in_units
    monkeypatch.setattr(kernels, "_strides_in_units", noted)
    norm = {"mean": [0.1] * channels, "std": [0.5 + c for c in range(channels)]}
    ours = extract_by_kernel(window, grid, ids, origin, last=by_pixel, **norm)
    plain = reference.extract_regions(whole.to(device), grid, regions=ids, **norm)
    truth = reference.extract_regions(
        whole.double().to(device), grid, regions=ids, dtype=torch.float64, **norm
    )
    assert_no_worse(ours, plain, truth)
    grad = torch.empty_like(ours).copy_(make(ours.shape, torch.float32, 1)[0])
    ours = extract_gradient_by_kernel(grad, window, grid, ids, origin, **norm)
    found = []
    for source, output in ((whole, grad), (whole.double(), grad.double())):
        leaf = source.to(device).requires_grad_()
        cut = reference.extract_regions(leaf, grid, regions=ids, dtype=output.dtype, **norm)
        found.append(torch.autograd.grad(cut, leaf, output)[0][:, :, origin[0] :, origin[1] :])
    assert_no_worse(ours, *found)
    assert units == [8, 8]


@pytest.mark.parametrize("order", ["row", "tile"])
@pytest.mark.parametrize("by_planes", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_stitching_kernel_is_no_worse_than_eager(honest, device, dtype, by_planes, order):
    low, wide = maps((1, 4, 4, 4, 40), dtype, by_planes, 0, device)
    ours = stitch_by_kernel(low, GRID, None, SHUFFLED, order)
    truth = stitch_truth(wide, GRID, order, chunk=SHUFFLED)
    plain = reference.stitch_regions(low, GRID, channels_last=True, order=order, chunk=SHUFFLED)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, truth, atol=1e-6, rtol=0)
    else:
        assert_no_worse(ours, plain, truth)


@pytest.mark.parametrize("by_planes", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_moving_tokens_is_exact(honest, device, dtype, by_planes):
    low, _ = maps((1, 6, 4, 4, 5), dtype, by_planes, 0, device, "count")
    tokens = stitch_by_kernel(low, GRID, position=False)
    expected = reference.stitch_regions(low, GRID, channels_last=True, position=False)
    assert torch.equal(tokens, expected)
    grad = stitch_gradient_by_kernel(tokens, low, GRID)
    back = torch.zeros_like(low)
    for k, slot in enumerate(places(GRID, 4)[0].tolist()):
        back[:, k, : slot[2], : slot[3]] = low[:, k, : slot[2], : slot[3]]
    assert torch.equal(grad, back)


ALL_EXTRACT = [*kernels.EXTRACT_PLANES_CONFIGS, *kernels.EXTRACT_PIXELS_CONFIGS]
ALL_STITCH = [*kernels.STITCH_ROWS_CONFIGS, *kernels.STITCH_PLANES_CONFIGS]


def label(config):
    return "x".join(map(str, config.tile.values()))


@pytest.mark.parametrize("config", ALL_EXTRACT, ids=label)
def test_every_extraction_config(honest, device, config):
    # Several strips, more channels than a block, and (cut to 16 columns for the interpreter's sake)
    # more than one block of columns.
    config = replace(config, tile={**config.tile, "BLOCK_W": 16})
    grid = RegionGrid(20, 30, 24)
    image, _ = picture((1, 5, 20, 30), torch.uint8, 0, device)
    ours = extract_by_kernel(image, grid, config=config)
    assert torch.equal(ours, reference.extract_regions(image, grid))


@pytest.mark.parametrize("config", ALL_STITCH, ids=label)
def test_every_stitching_config(honest, device, config):
    # 12 tokens a side are one and a half blocks of lines and of steps, 132 channels one and a bit.
    grid = RegionGrid(24, 40, 24)
    low, wide = maps((1, 2, 12, 12, 264), torch.float32, "planes" in label(config), 0, device)
    ours = stitch_by_kernel(low, grid, config=config)
    plain = reference.stitch_regions(low, grid, channels_last=True)
    assert_no_worse(ours, plain, stitch_truth(wide, grid))


@pytest.mark.parametrize("index", [0, 1000, 100_000, 10_000_000, 2**31 - 64])
def test_position_is_exact_to_1e_6_at_any_index(honest, device, index):
    index -= index % 8
    grid = RegionGrid(index + 8, index + 8, 8)
    region = grid.num_regions - 1
    zeros = torch.zeros(1, 1, 8, 8, 16, device=device)
    token = torch.arange(index, index + 8)
    truth = exact_code(token.repeat_interleave(8), token.repeat(8), 16)
    kernel = stitch_by_kernel(zeros, grid, None, (region,))
    assert (kernel[0].cpu() - truth).abs().max() < 1e-6
    public = xk.stitch_regions(zeros[0], grid, chunk=[region], channels_last=True)
    assert (public.cpu() - truth).abs().max() < 1e-6


def test_position_of_many_indices_on_the_way_to_100_000(honest, device):
    # One row of tokens, 24 pieces of it: fractions of a turn of every kind come by.
    grid = RegionGrid(1, 100_352, 64)
    chunk = tuple(range(0, grid.num_regions, 65))
    zeros = torch.zeros(1, 1, 1, 64, 64, device=device).expand(1, len(chunk), 64, 64, 64)
    config = kernels.Config({"BLOCK_S": 64, "BLOCK_L": 64, "BLOCK_C": 32}, 4)
    tokens = stitch_by_kernel(zeros, grid, None, chunk, order="tile", config=config)
    index = (torch.tensor(chunk)[:, None] * 64 + torch.arange(64)).reshape(-1)
    truth = exact_code(torch.zeros_like(index), index, 64)
    assert (tokens[0].cpu() - truth).abs().max() < 5e-7


def test_the_bound_sees_planted_faults(honest, device):
    """A swapped axis, a cosine for a sine, a lost bias and an off-by-one place are all rejected."""
    low, wide = maps((1, 6, 4, 4, 8), torch.float32, False, 0, device)
    plain = reference.stitch_regions(low, GRID, channels_last=True)
    truth = stitch_truth(wide, GRID)
    good = stitch_by_kernel(low, GRID)
    assert_no_worse(good, plain, truth)
    bad = [
        good.roll(1, dims=1),
        good + 1e-5,
        stitch_by_kernel(low.transpose(2, 3), GRID),
        stitch_by_kernel(low, GRID, position=False),
    ]
    for tokens in bad:
        with pytest.raises(AssertionError):
            assert_no_worse(tokens, plain, truth)


# 3. Are the gradients the derivatives?


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(channels_last):
    shape = (2, 5, 7, 3) if channels_last else (2, 3, 5, 7)
    image = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grid = RegionGrid(5, 7, 4)

    def cut(x):
        return xk.extract_regions(
            x,
            grid,
            regions=[3, 0, 2],
            channels_last=channels_last,
            mean=[0.1, 0.2, 0.3],
            std=[0.5, 2.0, 3.0],
            dtype=torch.float64,
        )

    assert torch.autograd.gradcheck(cut, image)
    shape = (2, 3, 4, 4, 4)
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def stitched(x):
        return xk.stitch_regions(
            x, grid, regions=[3, 0, 2], chunk=[2, 3, 1, 0], channels_last=channels_last
        )

    assert torch.autograd.gradcheck(stitched, features)


def test_a_second_derivative_fails_clearly():
    image = torch.randn(3, 5, 7, requires_grad=True)
    cut = xk.extract_regions(image, RegionGrid(5, 7, 4))
    (grad,) = torch.autograd.grad((cut**2).sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
    features = torch.randn(4, 4, 2, 2, requires_grad=True)
    tokens = xk.stitch_regions(features, RegionGrid(5, 7, 4))
    (grad,) = torch.autograd.grad((tokens**2).sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


# 4. Is it a good citizen?


def op_calls(device):
    image = torch.randn(2, 3, 13, 21, device=device)
    maps_ = torch.randn(2, 4, 4, 4, 8, device=device)
    buffer = torch.zeros(2, 77, 8, device=device)
    size = (13, 21, 8)
    yield (
        ops.extract_forward,
        (
            image.clone().requires_grad_(),
            [1.0, 2.0, 3.0],
            [0.0, 0.5, 0.1],
            [5, 0, 4],
            *size,
            0,
            0,
            torch.float32,
            False,
        ),
    )
    yield (
        ops.extract_backward,
        (
            torch.randn(2, 3, 3, 8, 8, device=device),
            [1.0, 2.0, 3.0],
            [5, 0, 4],
            *size,
            0,
            0,
            [13, 21],
            torch.float32,
            True,
        ),
    )
    yield (
        ops.stitch_forward,
        (
            maps_.clone().requires_grad_(),
            [5, 0, 4, 2],
            None,
            77,
            *size,
            "row",
            True,
            torch.float32,
            True,
        ),
    )
    regions = torch.zeros(2, 3, 3, 8, 8, device=device)
    numbers = ([1.0, 2.0, 3.0], [0.0, 0.5, 0.1])
    yield ops.extract_into, (image, regions, *numbers, [5, 0, 4], *size, 0, 0)
    yield ops.stitch_into, (maps_, buffer, [5, 0, 4, 2], None, *size, "row", True)
    yield (
        ops.stitch_backward,
        (
            torch.randn(2, 77, 8, device=device),
            [5, 0, 4, 2],
            None,
            4,
            *size,
            "tile",
            4,
            torch.float32,
            False,
        ),
    )


@pytest.mark.parametrize("number", range(6))
def test_opcheck(number, device):
    op, args = list(op_calls(device))[number]
    torch.library.opcheck(op.registered, args)
    if op not in (ops.extract_into, ops.stitch_into):
        first, *others = args
        alone = first[0].detach().requires_grad_(first.requires_grad)
        torch.library.opcheck(op.registered, (alone, *others))
        assert torch.equal(op(alone, *others), op(first, *others)[0])


def test_compile_without_graph_break(device):
    grid = RegionGrid(13, 21, 8)
    image = torch.randn(2, 3, 13, 21, device=device, requires_grad=True)
    weight = torch.randn(8, 3, 1, 1, device=device)
    buffer = torch.zeros(2, 77, 8, device=device)

    def walk(x):
        cut = xk.extract_regions(x, grid, regions=(0, 4, 5), mean=(0.1, 0.2, 0.3))
        features = torch.nn.functional.conv2d(cut.flatten(0, 1), weight, stride=2)
        return xk.stitch_regions(features.unflatten(0, (2, 3)), grid, regions=(0, 4, 5)) * 2

    def fill(x):
        with torch.no_grad():
            return xk.stitch_regions(x, grid, regions=(0, 4, 5), out=buffer)

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(walk, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(image), walk(image))
    grads = [torch.autograd.grad(f(image).square().sum(), image)[0] for f in (compiled, walk)]
    torch.testing.assert_close(*grads)
    features = torch.randn(2, 3, 8, 4, 4, device=device)
    expected = fill(features).clone()
    buffer.zero_()
    torch.compile(fill, fullgraph=True, backend=backend)(features)
    assert torch.equal(buffer, expected)


def both(image, features):
    """One call of each op."""
    return (
        xk.extract_regions(image, GRID, regions=[5, 0], mean=[0.1, 0.2, 0.3]),
        xk.stitch_regions(features, GRID),
    )


@pytest.mark.filterwarnings("ignore:.*not yet implemented the batching rule")
def test_traces_fakes_and_transforms_go_through_the_dispatcher():
    tensors = torch.randn(3, 13, 21), torch.randn(6, 8, 4, 4)
    wanted = both(*tensors)
    traced = make_fx(both)(*(torch.zeros_like(t) for t in tensors))
    targets = {node.target for node in traced.graph.nodes}
    xt = torch.ops.xt
    assert {xt.extract_regions_fwd.default, xt.stitch_regions_fwd.default} <= targets
    for ours, plain in zip(traced(*tensors), wanted, strict=True):
        assert torch.equal(ours, plain)

    with FakeTensorMode() as mode:
        fakes = both(*(mode.from_tensor(t) for t in tensors))
    assert all(type(fake) is FakeTensor for fake in fakes)
    assert [fake.shape for fake in fakes] == [plain.shape for plain in wanted]

    stacks = [torch.stack([t, 2 * t]) for t in tensors]
    mapped = torch.vmap(both)(*stacks)
    for place in range(2):
        for ours, plain in zip(mapped, both(*(t[place] for t in stacks)), strict=True):
            assert torch.equal(ours[place], plain)


def test_a_buffer_filled_again_is_not_taken_for_what_it_was():
    """Autograd refuses to use a buffer that changed since it was saved."""
    weight = torch.ones((), requires_grad=True)
    cut, tokens = (torch.zeros_like(t) for t in both(torch.zeros(3, 13, 21), MAPS))
    for buffer, fill in (
        (cut, lambda: xk.extract_regions(IMAGE, GRID, regions=[5, 0], out=cut)),
        (tokens, lambda: xk.stitch_regions(MAPS, GRID, out=tokens)),
    ):
        product = (buffer * weight).sum()
        with torch.no_grad():
            fill()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_without_the_names_that_torch_keeps_private_the_ops_are_dispatched():
    code = """
import torch
del torch._C._len_torch_dispatch_stack
import xt_kernels as xk
from torch.autograd.profiler import profile
from xt_kernels.regions import direct
image = torch.randn(3, 13, 21, requires_grad=True)
assert not direct.is_plain(image)
with profile() as kept:
    cut = xk.extract_regions(image, xk.RegionGrid(13, 21, 8))
assert "xt::extract_regions_fwd" in {event.name for event in kept.function_events}
cut.sum().backward()
assert (image.grad == 1).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_autocast_leaves_dtypes_alone(device):
    with torch.autocast(device, torch.bfloat16):
        cut = xk.extract_regions(torch.randn(3, 9, 9, device=device), RegionGrid(9, 9, 4))
        tokens = xk.stitch_regions(torch.randn(9, 4, 2, 2, device=device), RegionGrid(9, 9, 4))
    assert cut.dtype == tokens.dtype == torch.float32


def test_strides_of_every_kind_and_inputs_untouched(honest, device):
    image = with_gaps(picture((2, 3, 13, 21), torch.float32, 0, device)[0])
    features = with_gaps(maps((2, 6, 4, 4, 8), torch.float32, False, 0, device)[0])
    before = image.clone(), features.clone()
    cut = extract_by_kernel(image, GRID)
    tokens = stitch_by_kernel(features, GRID)
    assert torch.equal(image, before[0]) and torch.equal(features, before[1])
    assert torch.equal(cut, reference.extract_regions(before[0], GRID))
    torch.testing.assert_close(
        tokens, reference.stitch_regions(before[1], GRID, channels_last=True), atol=1e-6, rtol=1e-6
    )
    if device == "cpu":
        torch.testing.assert_close(xk.extract_regions(image, GRID), cut)
        assert torch.equal(
            xk.stitch_regions(features, GRID, channels_last=True),
            reference.stitch_regions(before[1], GRID, channels_last=True),
        )
    grad = with_gaps(torch.randn(2, 6, 3, 8, 8, device=device))
    whole = extract_gradient_by_kernel(grad, image, GRID)
    assert torch.equal(whole, extract_gradient_by_kernel(grad.contiguous(), before[0], GRID))
    grad = with_gaps(torch.randn(2, 77, 8, device=device))
    whole = stitch_gradient_by_kernel(grad, features, GRID)
    assert torch.equal(whole, stitch_gradient_by_kernel(grad.contiguous(), before[1], GRID))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regions_are_cut_into_buffers_of_any_strides(device, dtype):
    image = torch.randint(256, (2, 3, 13, 21), dtype=torch.uint8, device=device)
    whole = xk.extract_regions(image, GRID, mean=[0.1, 0.2, 0.3], dtype=dtype)
    # Stored [C, R, B, s, s], with a region more at either end and each fourth column used.
    storage = torch.full((3, 8, 2, 8, 8, 4), math.nan, dtype=dtype, device=device)
    buffer = storage.permute(2, 1, 0, 3, 4, 5)[:, 1:-1, ..., 3]
    for ids in ([4, 1], [0, 5, 3, 2]):
        part = torch.empty_like(buffer[:, : len(ids)])
        found = xk.extract_regions(image, GRID, regions=ids, mean=[0.1, 0.2, 0.3], out=part)
        assert found is part
        assert torch.equal(part, whole[:, ids])
    xk.extract_regions(image, GRID, mean=[0.1, 0.2, 0.3], out=buffer)
    assert torch.equal(buffer, whole)
    assert torch.equal(
        xk.extract_regions(image[0], GRID, mean=[0.1, 0.2, 0.3], out=part[0, :1], regions=[2]),
        whole[0, 2:3],
    )
    assert storage[..., :3].isnan().all() and storage[:, [0, -1]].isnan().all()


def test_buffers_are_filled_in_any_number_of_calls_and_order(device):
    features = torch.randn(2, 6, 8, 4, 4, device=device)
    whole = xk.stitch_regions(features, GRID)
    # Stored [L, B, C], with one token more than asked for on either side.
    storage = torch.full((79, 2, 8), math.nan, dtype=torch.float64, device=device)
    buffer = storage[1:-1].transpose(0, 1)
    for ids in ([4, 1], [], [0], [5, 2, 3]):
        xk.stitch_regions(features[:, ids], GRID, regions=ids, out=buffer)
    assert torch.equal(buffer.float(), whole)
    assert storage[[0, -1]].isnan().all()


def test_numbers_come_as_sequences_arrays_and_tensors():
    image, features = picture((3, 13, 21), torch.uint8)[0], torch.randn(2, 8, 4, 4)
    cut = xk.extract_regions(image, GRID, regions=[4, 1], mean=[0, 1, 2], std=[1, 2, 3], scale=1)
    tokens = xk.stitch_regions(features, GRID, regions=[4, 1], chunk=[1, 2, 4])
    for kind in (tuple, np.array, torch.tensor):
        options = {"mean": kind([0, 1, 2]), "std": kind([1, 2, 3]), "scale": np.float32(1)}
        origin, grid = kind([0, 0]), RegionGrid(*np.array([13, 21, 8], dtype=np.uint8))
        ours = xk.extract_regions(image, grid, regions=kind([4, 1]), origin=origin, **options)
        assert torch.equal(ours, cut)
        lists = {"regions": kind([4, 1]), "chunk": kind([1, 2, 4])}
        assert torch.equal(xk.stitch_regions(features, GRID, **lists), tokens)


def test_a_call_is_checked_though_one_like_it_was_made_before():
    image, features = picture((3, 13, 21), torch.uint8)[0], torch.randn(2, 8, 4, 4)
    ids, mean = [4, 1], [0, 1, 2]

    def calls(ids=ids, chunk=None, origin=(0, 0), mean=mean, scale=1, image=image, grid=GRID):
        options = {"origin": origin, "mean": mean, "scale": scale}
        cut = xk.extract_regions(image, grid, regions=ids, **options)
        return cut, xk.stitch_regions(features, grid, regions=ids, chunk=chunk)

    first = calls()
    for bad in ([4.0, 1], [4, True], [4, 4], [4, 6], [4, None]):
        # An error is not taken for an answer either.
        for _ in range(2):
            with pytest.raises(ValueError, match=r"_regions: regions must|distinct"):
                xk.stitch_regions(features, GRID, regions=bad)
    for bad in ({"ids": [True, 1]}, {"origin": (0.0, 0)}, {"mean": [0, 1]}, {"scale": math.nan}):
        with pytest.raises(ValueError, match=r"^extract_regions: "):
            calls(**bad)
    with pytest.raises(ValueError, match=r"^extract_regions: image must hold all pixels"):
        calls(image=image[:, :-1])
    for again, once in zip(calls(), first, strict=True):
        assert torch.equal(again, once)

    # What was remembered is what the lists held then.
    ids.reverse()
    mean[0] = 1
    cut, tokens = calls()
    assert torch.equal(cut[:, 1:], first[0].flip(0)[:, 1:])
    plain = xk.extract_regions(image, GRID, regions=(1, 4), scale=1)
    assert torch.equal(cut[:, 0, :5], plain[:, 0, :5] - 1)  # below is padding, which stays zero
    assert torch.equal(tokens, xk.stitch_regions(features.flip(0), GRID, regions=[4, 1]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_region_is_the_same_alone_and_among_others(memory_format, channels_last):
    grid = RegionGrid(90, 120, 16)
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    image = image.movedim(0, -1).contiguous() if channels_last else image
    options = {"mean": MEAN[:3], "std": STD[:3], "memory_format": memory_format}
    options["channels_last"] = channels_last
    whole = xk.extract_regions(image, grid, **options)
    for region in range(grid.num_regions):
        alone = xk.extract_regions(image, grid, regions=[region], **options)
        assert torch.equal(alone[0], whole[region])


def test_importing_the_ops_imports_no_triton():
    code = (
        "import sys, torch; before = set(sys.modules); import xt_kernels, xt_kernels.reference;"
        "sys.exit(any(name.split('.')[0] == 'triton' for name in set(sys.modules) - before))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_eager_form_is_no_worse_than_the_definition():
    for seed in range(36):
        generator = torch.Generator().manual_seed(seed)

        def below(n, generator=generator):
            return int(torch.randint(n, (), generator=generator))

        grid = RegionGrid(1 + below(40), 1 + below(40), 2 + 2 * below(5))
        ids = torch.randperm(grid.num_regions, generator=generator).tolist()
        if seed % 3:
            ids = sorted(ids[: 1 + below(len(ids))] if seed % 3 == 1 else ids)
        channels_last, channels = bool(below(2)), 1 + below(len(MEAN))
        size = (grid.height, grid.width)
        shape = (2, *size, channels) if channels_last else (2, channels, *size)
        pixel = [torch.uint8, torch.uint16, torch.float32, torch.bfloat16][seed % 4]
        options = {
            "regions": ids,
            "channels_last": channels_last,
            "dtype": FLOATS[below(4)],
            "memory_format": FORMATS[below(2)],
            "mean": MEAN[:channels] if below(2) else None,
            "std": STD[:channels] if below(2) else None,
        }
        image = make(shape, pixel, seed)[0]
        ours = xk.extract_regions(image, grid, **options)
        plain = reference.extract_regions(image, grid, **options)
        scale = options["scale"] = {torch.uint8: 1 / 255, torch.uint16: 1 / 65535}.get(pixel, 1.0)
        wide = {**options, "scale": scale, "dtype": torch.float64}
        truth = reference.extract_regions(image.double(), grid, **wide)
        if options["dtype"] == torch.float64:
            torch.testing.assert_close(ours, truth, atol=1e-6, rtol=1e-6)
        else:
            assert_no_worse(ours, plain, truth)
        assert ours.flatten(0, 1).is_contiguous(memory_format=options["memory_format"])

        side = grid.region // 2
        shape = (len(ids), side, side, 8) if channels_last else (len(ids), 8, side, side)
        options = {
            "regions": ids,
            "channels_last": channels_last,
            "order": ("row", "tile")[below(2)],
            "position": bool(below(2)),
            "dtype": FLOATS[below(4)],
        }
        features = make(shape, FLOATS[seed % 4], seed)[0]
        ours = xk.stitch_regions(features, grid, **options)
        assert torch.equal(ours, reference.stitch_regions(features, grid, **options))


# 5. Edges


def test_a_window_of_the_image(honest, device):
    image, _ = picture((1, 2, 13, 21), torch.uint8, 0, device)
    window = image[:, :, 8:, 7:17]
    ours = extract_by_kernel(window, GRID, (4,), origin=(8, 7))
    assert torch.equal(ours, reference.extract_regions(image, GRID, regions=[4]))
    public = xk.extract_regions(window, GRID, regions=[4], origin=(8, 7))
    assert torch.equal(public, ours)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 8), (7, 17)])
def test_sizes_around_a_region(honest, device, size):
    grid = RegionGrid(*size, 8)
    image, _ = picture((1, 1, *size), torch.uint8, 0, device)
    ours = extract_by_kernel(image, grid)
    assert torch.equal(ours, reference.extract_regions(image, grid))
    for side in (1, 8):
        features, _ = maps((1, grid.num_regions, side, side, 4), torch.float32, False, 0, device)
        tokens = stitch_by_kernel(features, grid)
        expected = reference.stitch_regions(features, grid, channels_last=True)
        torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=1e-6)


def test_no_regions_and_no_batch(device):
    image = torch.zeros(3, 13, 21, device=device)
    assert xk.extract_regions(image, GRID, regions=[]).shape == (0, 3, 8, 8)
    assert xk.extract_regions(image[None][:0], GRID).shape == (0, 6, 3, 8, 8)
    features = torch.zeros(0, 8, 4, 4, device=device)
    assert xk.stitch_regions(features, GRID, regions=[]).eq(torch.zeros(77, 8, device=device)).all()
    assert xk.stitch_regions(features, GRID, chunk=[]).shape == (0, 8)
    assert xk.stitch_regions(features.expand(0, 0, 8, 4, 4), GRID, chunk=[]).shape == (0, 0, 8)


def test_regions_not_given_are_zero_and_repeated_ones_are_cut_twice(device):
    features = torch.randn(2, 8, 4, 4, device=device)
    tokens = xk.stitch_regions(features, GRID, regions=[5, 1])
    whole = reference.stitch_regions(
        features.new_zeros(6, 8, 4, 4).index_copy(0, torch.tensor([5, 1], device=device), features),
        GRID,
        position=False,
    )
    assert torch.equal(tokens.eq(0).all(1), whole.eq(0).all(1))
    image = torch.randn(3, 13, 21, device=device)
    twice = xk.extract_regions(image, GRID, regions=[2, 2])
    assert torch.equal(twice[0], twice[1])


def spread(size, strides, dtype):
    """Sparse zeros whose strides are near the given powers of two but collide nowhere."""
    return sparse(size, [s + 2 ** (3 * i) if s > 1 else 1 for i, s in enumerate(strides)], dtype)


def far(values, strides):
    """`values` in sparse memory under `strides`."""
    view = spread(values.shape, strides, values.dtype)
    view.copy_(values)
    return view


@pytest.mark.skipif(torch.cuda.is_available(), reason="sparse memory is for the interpreter")
class TestOffsetsPast2To31:
    """Every product of an index and a stride passes 2**31 with both factors below it."""

    grid = RegionGrid(8, 21, 8)  # the third region is partly padding: both branches run
    big = (2**30, 2**29, 2**29, 2**29)
    big_regions = (2**30, 2**30, 2**29, 2**29, 2**29)

    def boxes(self):
        return far(ops._boxes(self.grid, None, 0, 0), (2**30, 1))

    def extract(self):
        image = far(torch.randint(1, 255, (3, 5, 8, 21)).to(torch.uint8), self.big)
        out = spread((3, 3, 5, 8, 8), self.big_regions, torch.float16)
        gain, bias = torch.full((5,), 0.5), torch.full((5,), 0.25)
        with honest_interpreter():
            kernels.launch_extract_forward(image, self.boxes(), gain, bias, out)
        expected = reference.extract_regions(
            image.clone(), self.grid, scale=0.5, mean=[-0.25] * 5, dtype=torch.float16
        )
        assert torch.equal(out.clone(), expected)

    def extract_backward(self):
        grad = far(torch.randn(3, 3, 5, 8, 8).half(), self.big_regions)
        out = spread((3, 5, 8, 21), self.big, torch.float16)
        with honest_interpreter():
            kernels.launch_extract_backward(grad, self.boxes(), torch.full((5,), 0.5), out)
        pieces = (grad.clone() * 0.5).movedim(1, 3).reshape(3, 5, 8, 24)
        assert torch.equal(out.clone(), pieces[..., :21])

    # One row of tokens, so that few places span far: 12 of them.
    strip = RegionGrid(1, 24, 8)
    tokens = (2**30, 3 * 2**28, 2**29)

    def table(self):
        return far(places(self.strip, 4, order="tile")[0], (2**30, 1))

    def features(self, by_planes):
        values = torch.randn(3, 3, 4, 4, 8).half()
        if not by_planes:
            return far(values, (2**30, 2**30, 3 * 2**28, 3 * 2**28, 2**29))
        # Rows follow one another: the stride of a row is four times that of a token.
        strides = [2**30 + 1, 2**30 + 8, 4 * (2**29 + 64), 2**29 + 64, 2**29 + 512]
        view = sparse(values.shape, strides, values.dtype)
        view.copy_(values)
        return view

    def stitch(self):
        for by_planes in (False, True):
            features = self.features(by_planes)
            out = spread((3, 12, 8), self.tokens, torch.float16)
            with honest_interpreter():
                kernels.launch_stitch_forward(features, self.table(), ops._turns(8), out)
            expected = reference.stitch_regions(
                features.clone(), self.strip, channels_last=True, order="tile"
            )
            torch.testing.assert_close(out.clone(), expected, atol=2e-3, rtol=2e-3)

    def stitch_backward(self):
        for by_planes in (False, True):
            grad = far(torch.randn(3, 12, 8).half(), self.tokens)
            out = self.features(by_planes)
            with honest_interpreter():
                kernels.launch_stitch_backward(grad, self.table(), out)
            expected = torch.zeros(3, 3, 4, 4, 8).half()
            expected[:, :, 0] = grad.clone().view(3, 3, 4, 8)
            assert torch.equal(out.clone(), expected)

    def test_extract(self):
        assert check_mutants(kernels, "_extract_regions_fwd_kernel", self.extract) >= 6

    def test_extract_backward(self):
        name = "_extract_regions_bwd_kernel"
        assert check_mutants(kernels, name, self.extract_backward) >= 6

    def test_stitch(self):
        assert check_mutants(kernels, "_stitch_regions_fwd_kernel", self.stitch) >= 6

    def test_stitch_backward(self):
        name = "_stitch_regions_bwd_kernel"
        assert check_mutants(kernels, name, self.stitch_backward) >= 6


# 6. Does it refuse well?

IMAGE = torch.zeros(3, 13, 21)
MAPS = torch.zeros(6, 8, 4, 4)
MEMORY = torch.zeros(2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (13, 21, 8)}, "grid must be a RegionGrid, got tuple"),
        ({"image": IMAGE[0]}, r"image must be \[C, h, w\] or \[B, C, h, w\], got shape \[13, 21\]"),
        ({"image": IMAGE.int()}, "image must be of dtype uint8, .* or float64, got int32"),
        ({"image": IMAGE.to("meta")}, "image must be on a cpu or cuda device, got meta"),
        ({"dtype": torch.int8}, "dtype must be of dtype float16, .* got int8"),
        ({"memory_format": torch.preserve_format}, "memory_format must be .* got torch.preserve"),
        ({"mean": [1.0]}, "mean must hold one number for each channel of image = 3, got 1"),
        ({"std": [1.0] * 4}, "std must hold one number for each channel of image = 3, got 4"),
        ({"std": [1.0, 0.0, 1.0]}, r"std must be nonzero, got \[1.0, 0.0, 1.0\]"),
        ({"scale": math.inf}, "scale must be a finite number, got inf"),
        ({"scale": "x"}, "scale must be a finite number, got 'x'"),
        ({"image": IMAGE.numpy()}, "image must be a torch.Tensor, got ndarray"),
        ({"image": IMAGE.to_sparse()}, "image must be a strided tensor, got torch.sparse_coo"),
        ({"mean": 0.5}, "mean must hold one number for each channel of image = 3, got 0.5"),
        ({"mean": torch.ones(4)}, "mean must hold one number for each channel of .* = 3, got 4"),
        ({"mean": [0, math.nan, 0]}, r"mean must be finite, got \[0.0, nan, 0.0\]"),
        ({"std": [1e-45] * 3}, r"scale / std must fit in float32, got \[1.0\d*e\+45, "),
        ({"mean": [1e38] * 3, "std": [0.1] * 3}, "mean / std must fit in float32, got "),
        ({"regions": [1.7]}, r"regions must hold integers, the numbers of regions, got \[1.7\]"),
        ({"regions": [True]}, r"regions must hold integers, .* got \[True\]"),
        ({"regions": "12"}, "regions must hold integers, .* got '12'"),
        ({"regions": 1}, "regions must hold integers, .* got 1"),
        ({"regions": torch.tensor([1.0])}, r"regions must hold integers, .* got tensor\(\[1.\]\)"),
        ({"origin": 0}, r"origin must be two integers, \(row, column\), got 0"),
        ({"origin": (0,)}, r"origin must be two integers, \(row, column\), got \(0,\)"),
        ({"origin": (-0.9, -0.9)}, r"origin must be two integers, .* got \(-0.9, -0.9\)"),
        (
            {"out": torch.zeros(6, 3, 8, 8), "memory_format": torch.channels_last},
            "memory_format must be left out where out is given, got torch.channels_last",
        ),
        ({"out": MEMORY.as_strided((6, 3, 8, 8), (192, 64, 7, 1))}, "out must have memory of its"),
        (
            {"out": MEMORY[800:1952].view(6, 3, 8, 8), "image": MEMORY[:819].view(3, 13, 21)},
            "out must lie apart from image in memory, got a view of the same",
        ),
        ({"regions": [0, 6]}, r"regions must hold region numbers of the grid, in \[0, 6\), got 6"),
        ({"regions": [-1]}, r"regions .* in \[0, 6\), got -1"),
        (
            {"image": IMAGE[:, :12]},
            "image must hold all pixels of region 3 = rows 8 to 13, columns 0 to 8",
        ),
        (
            {"origin": (0, 1)},
            "image must hold all pixels of .* got a window of rows 0 to 13, columns 1",
        ),
        ({"regions": [5], "origin": (9, 9)}, "image must hold all pixels of region 5"),
        (
            {"image": IMAGE.clone().requires_grad_(), "regions": [2, 2]},
            "regions must hold distinct region numbers where image needs a gradient, got 2 twice",
        ),
        ({"out": torch.zeros(5, 3, 8, 8)}, r"out must be \[R, C, s, s\] = \[6, 3, 8, 8\], got .*5"),
        (
            {"out": torch.zeros(6, 3, 8, 8), "dtype": torch.float16},
            "out must be of dtype = float16, got float32",
        ),
        ({"out": torch.zeros(6, 3, 8, 8, device="meta")}, "out must be on the device of image ="),
        ({"out": torch.zeros(6, 3, 8, 1).expand(6, 3, 8, 8)}, "out must have memory of its own"),
        (
            {"out": torch.zeros(6, 3, 8, 8), "image": IMAGE.clone().requires_grad_()},
            "out must be None where a gradient is needed, got a buffer",
        ),
    ],
)
def test_extraction_refuses(options, message):
    options = {"image": IMAGE, "grid": GRID, **options}
    with pytest.raises(ValueError, match=f"^extract_regions: {message}"):
        xk.extract_regions(options.pop("image"), options.pop("grid"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": None}, "grid must be a RegionGrid, got NoneType"),
        ({"features": MAPS[0]}, r"features must be \[R, C, t, t\] or .* got shape \[8, 4, 4\]"),
        ({"features": MAPS.long()}, "features must be of dtype float16, .* got int64"),
        ({"features": MAPS.to("meta")}, "features must be on a cpu or cuda device, got meta"),
        ({"features": MAPS[..., :2]}, "features must have square token maps, t x t, got 4 x 2"),
        ({"features": MAPS[..., :3, :3]}, "tokens a side that divides the region side = 8, got 3"),
        ({"features": MAPS[:, :6]}, "have a multiple of 4 channels where position is added, got 6"),
        ({"features": MAPS[:5]}, "features must hold as many regions as chunk = 6, got 5"),
        ({"regions": [0]}, "features must hold as many regions as regions = 1, got 6"),
        ({"regions": [0, 0]}, "regions must hold distinct region numbers, got 0 twice"),
        ({"regions": [6]}, r"regions must hold region numbers of the grid, in \[0, 6\), got 6"),
        ({"regions": [0.5]}, r"regions must hold integers, .* got \[0.5\]"),
        ({"chunk": 3}, "chunk must hold integers, the numbers of regions, got 3"),
        ({"features": MAPS.numpy()}, "features must be a torch.Tensor, got ndarray"),
        ({"out": [0.0]}, "out must be a torch.Tensor, got list"),
        ({"out": MEMORY.as_strided((77, 8), (4, 1))}, r".* of its own .* strides \(4, 1\)"),
        (
            {"out": MEMORY[700:1316].view(77, 8), "features": MEMORY[:768].view(6, 8, 4, 4)},
            "out must lie apart from features in memory",
        ),
        ({"chunk": [1, 1]}, "chunk must hold distinct region numbers, got 1 twice"),
        ({"chunk": [9]}, r"chunk must hold region numbers of the grid, in \[0, 6\), got 9"),
        ({"chunk": [1, 2], "regions": [3]}, "regions must be in chunk, got 3"),
        ({"order": "column"}, "order must be 'row' or 'tile', got 'column'"),
        ({"dtype": torch.int32}, "dtype must be of dtype float16, .* got int32"),
        ({"out": torch.zeros(76, 8)}, r"out must be \[L, C\] = \[77, 8\], got \[76, 8\]"),
        ({"out": torch.zeros(1, 77, 8)}, r"out must be \[L, C\] = \[77, 8\], got \[1, 77, 8\]"),
        ({"out": torch.zeros(77, 8).int()}, "out must be of dtype float16, .* got int32"),
        (
            {"out": torch.zeros(77, 8), "dtype": torch.float16},
            "out must be of dtype = float16, got float32",
        ),
        ({"out": torch.zeros(77, 8, device="meta")}, "out must be on the device of features = cpu"),
        ({"out": torch.zeros(1, 8).expand(77, 8)}, "out must have memory of its own"),
        (
            {"out": torch.zeros(77, 8), "features": MAPS.clone().requires_grad_()},
            "out must be None where a gradient is needed, got a buffer",
        ),
    ],
)
def test_stitching_refuses(options, message):
    options = {"features": MAPS, "grid": GRID, **options}
    with pytest.raises(ValueError, match=f"^stitch_regions: .*{message}"):
        xk.stitch_regions(options.pop("features"), options.pop("grid"), **options)


# On a GPU: full sizes, shipped configs, determinism


def gpu_cases(device: str, full: bool) -> Iterator[GpuCase]:
    """Launches for `scripts/gpu_run.py`; at full size images have more than 2**31 elements, as have
    features of 3072 channels.
    """
    size, side = ((29_000, 25_000), 256) if full else ((20, 37), 16)
    grid = RegionGrid(*size, side)
    norm = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    # The fp64 truth of 29k x 25k would not fit: corners and a middle one stand for all regions.
    last = grid.num_regions - 1
    some = sorted({0, grid.cols - 1, grid.num_regions // 2, last - grid.cols + 1, last})
    generator = torch.Generator(device).manual_seed(0)
    layouts = [("planes", False), ("pixels", True)]

    for (name, by_pixel), dtype in product(layouts, (torch.bfloat16, torch.float16)):
        shape = (1, *size, 3) if by_pixel else (1, 3, *size)
        image = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
        image = image.movedim(-1, 1) if by_pixel else image

        def run(config, image=image, dtype=dtype, last=by_pixel):
            return [extract_by_kernel(image, grid, dtype=dtype, last=last, config=config, **norm)]

        def expected(image=image, dtype=dtype):
            plain = reference.extract_regions(image, grid, regions=some, dtype=dtype, **norm)
            truth = torch.cat([_cut64(image, grid, region, norm) for region in some], dim=1)
            return [(plain, truth)]

        configs = kernels.extract_configs(image)
        names = f"extract-{name}-{str(dtype)[6:]}"
        yield GpuCase(names, run, configs, expected, lambda outputs: [outputs[0][:, some]])

    gain = torch.tensor(norm["std"], dtype=torch.float64, device=device).reciprocal()[:, None, None]
    for name, by_pixel in layouts:
        shape = (1, grid.num_regions, side, side, 3)
        shape = shape if by_pixel else (*shape[:2], 3, side, side)
        grad = torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)
        grad = grad.movedim(-1, 2) if by_pixel else grad

        def run(config, grad=grad, by_pixel=by_pixel):
            image = torch.empty((1, *size, 3) if by_pixel else (1, 3, *size), dtype=grad.dtype)
            image = image.to(device).movedim(-1, 1) if by_pixel else image.to(device)
            # The regions cover the image, so each pixel is written.
            return [extract_gradient_by_kernel(grad, image, grid, config=config, out=image, **norm)]

        def select(outputs):
            boxes = [grid.box(region) for region in some]
            return [outputs[0][:, :, y : y + h, x : x + w] for y, x, h, w in boxes]

        def expected(grad=grad):
            pairs = []
            for region in some:
                _, _, height, width = grid.box(region)
                part = grad[:, region, :, :height, :width]
                pairs.append(((part.float() * gain.float()).to(grad.dtype), part.double() * gain))
            return pairs

        configs = kernels.extract_configs(grad[:, 0])
        yield GpuCase(f"extract-bwd-{name}", run, configs, expected, select)

    side, step = 8, 97
    rows, cols = grid.token_shape(grid.region // side)
    index = torch.arange(0, rows * cols, step)
    for by_planes, dtype, channels in (
        (False, torch.bfloat16, 768),
        (True, torch.bfloat16, 768),
        (False, torch.float16, 3072),
    ):
        channels = channels if full else 24
        shape = (1, grid.num_regions, side, side, channels)
        features = torch.ones(1, dtype=dtype, device=device).expand(shape).contiguous()
        if by_planes:
            features = features.movedim(-1, 2).contiguous().movedim(2, -1)

        def run(config, features=features):
            return [stitch_by_kernel(features, grid, config=config)]

        def expected(dtype=dtype, channels=channels):
            code = exact_code(index // cols, index % cols, channels)[None]
            return [((1 + code.float()).to(dtype), 1 + code)]

        configs = kernels.stitch_configs(features)
        name = f"{'planes' if by_planes else 'rows'}-{str(dtype)[6:]}-{channels}"
        select = lambda outputs: [outputs[0][:, ::step]]  # noqa: E731
        yield GpuCase(f"stitch-{name}", run, configs, expected, select)

        shape = (1, rows * cols, channels)
        grad = torch.randn(shape, dtype=dtype, device=device, generator=generator)

        def run(config, grad=grad, features=features):
            return [stitch_gradient_by_kernel(grad, features, grid, config=config)]

        def expected(grad=grad, channels=channels, dtype=dtype):
            moved = torch.zeros(1, len(some), side, side, channels, dtype=dtype, device=device)
            for k, region in enumerate(some):
                start, pitch, height, width = places(grid, side)[0][region, :4].tolist()
                for row in range(height):
                    first = start + row * pitch
                    moved[:, k, row, :width] = grad[:, first : first + width]
            return [(moved, moved.double())]

        select = lambda outputs: [outputs[0][:, some]]  # noqa: E731
        yield GpuCase(f"stitch-bwd-{name}", run, configs, expected, select)


def _cut64(image, grid, region, norm):
    """One region in fp64, `[B, 1, C, s, s]`."""
    top, left, height, width = grid.box(region)
    window = image[:, :, top : top + height, left : left + width].double()
    return reference.extract_regions(
        window,
        grid,
        regions=[region],
        origin=(top, left),
        scale=1 / 255,
        dtype=torch.float64,
        **norm,
    )


def test_gpu_cases_agree_with_their_references(honest, device):
    if device == "cuda":
        pytest.skip("test_full_size runs the same at full size")
    for case in gpu_cases(device, full=False):
        case.check(case.run(None))


@pytest.mark.gpu
def test_full_size():
    for case in gpu_cases("cuda", full=True):
        for config in (None, *case.configs):
            case.check(case.run(config))
        torch.cuda.empty_cache()


@pytest.mark.gpu
def test_the_public_ops_run_the_kernels_and_repeat_bit_by_bit():
    grid = RegionGrid(1000, 1500, 256)
    image = torch.randn(2, 3, 1000, 1500, device="cuda", requires_grad=True)
    features = torch.randn(2, 24, 96, 8, 8, device="cuda", requires_grad=True)
    results = []
    for _ in range(20):
        cut = xk.extract_regions(image, grid, std=[0.5, 2.0, 3.0])
        tokens = xk.stitch_regions(features, grid)
        grads = torch.autograd.grad([cut.sin().sum(), tokens.sin().sum()], [image, features])
        results.append([cut, tokens, *grads])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
    assert_no_worse(
        cut,
        reference.extract_regions(image, grid, std=[0.5, 2.0, 3.0]),
        reference.extract_regions(image.double(), grid, std=[0.5, 2.0, 3.0], dtype=torch.float64),
    )
