"""The kernels against the best eager form, in one process, in turns (see `measure.compare`).

    pytest bench/bench_kernels.py --benchmark-only

Sizes are small on a CPU and full on a GPU.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from baselines import (
    EXACT_ATTENTION,
    available,
    hashes,
    mamba_ssm_scan,
    published_hyper_attention,
)
from inputs import clustered
from measure import DEVICE, DTYPE, HAS_GPU, compare, full_only, seconds
from torch.nn.functional import pad, scaled_dot_product_attention

import xt_kernels as xk
from xt_kernels import RegionGrid, reference

SIZES = [(29_000, 25_000)] if HAS_GPU else [(256, 256), (1024, 1024), (2048, 2048)]
GRIDS = {grid.num_regions: grid for grid in (RegionGrid(*size, 256) for size in SIZES)}
CHANNELS = 768
NORM = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
COUNTS = list(GRIDS)
regions = pytest.mark.parametrize("regions", [*COUNTS[:2], *full_only(*COUNTS[2:])])


def a_channel(values):
    """`[C, 1, 1]`."""
    return torch.tensor(values, device=DEVICE)[:, None, None]


GAIN = a_channel([1 / 255 / s for s in NORM["std"]])
BIAS = a_channel([-m / s for m, s in zip(NORM["mean"], NORM["std"], strict=True)])


def cut_by_views(image, grid):
    """Regions `[R, C, s, s]` of `[C, h, w]`: pad and order bytes, cast, scale, cast."""
    side, rows, cols = grid.region, grid.rows, grid.cols
    padding = (0, cols * side - image.shape[2], 0, rows * side - image.shape[1])
    padded = pad(image, padding) if any(padding) else image.contiguous()
    blocks = padded.unflatten(2, (cols, side)).unflatten(1, (rows, side)).permute(1, 3, 0, 2, 4)
    out = blocks.to(torch.float32, memory_format=torch.contiguous_format).mul_(GAIN).add_(BIAS)
    if any(padding):
        # Zero after normalisation, as ours.
        inside = torch.ones(1, *image.shape[1:], dtype=torch.bool, device=DEVICE)
        inside = pad(inside, padding).unflatten(2, (cols, side)).unflatten(1, (rows, side))
        out.mul_(inside.permute(1, 3, 0, 2, 4))
    return out.to(DTYPE).view(-1, 3, side, side)


@regions
@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_extract(benchmark, layout, regions):
    grid = GRIDS[regions]
    image = torch.randint(256, (3, grid.height, grid.width), dtype=torch.uint8, device=DEVICE)
    last = layout == "pixels"
    if last:
        image = image.permute(1, 2, 0).contiguous()
    planes = image.permute(2, 0, 1) if last else image

    def ours():
        return xk.extract_regions(image, grid, channels_last=last, dtype=DTYPE, **NORM)

    num_bytes = image.numel() + regions * 3 * 256**2 * DTYPE.itemsize
    compare(
        benchmark, ours, {"views": lambda: cut_by_views(planes, grid)}, num_bytes,
        op="extract_regions", variant=layout, regions=regions, units=(regions, "regions"),
    )  # fmt: skip


def backward_of(form, inputs, grad):
    """Gradients of what `form()` gives, as a call that can be repeated."""
    out = form()
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


@regions
def test_extract_backward(benchmark, regions):
    # Whole regions, as many a side as the square root tells.
    side = min(round(regions**0.5), 8)
    grid = RegionGrid(side * 256, side * 256, 256)
    shape = (3, grid.height, grid.width)
    image = torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True)
    gain = (1 / a_channel(NORM["std"])).to(DTYPE)
    grad = torch.randn(grid.num_regions, 3, 256, 256, device=DEVICE, dtype=DTYPE)

    def cut():
        return xk.extract_regions(image, grid, std=NORM["std"], dtype=DTYPE)

    def views():
        blocks = image.view(3, side, 256, side, 256).permute(1, 3, 0, 2, 4)
        return (blocks * gain).reshape(-1, 3, 256, 256)

    ours, eager = (backward_of(form, [image], grad) for form in (cut, views))
    compare(
        benchmark, ours, {"views": eager}, 2 * grad.numel() * grad.element_size(),
        op="extract_regions", variant="backward", regions=grid.num_regions,
        units=(grid.num_regions, "regions"),
    )  # fmt: skip


def token_maps(layout, regions):
    """Features `[R, 8, 8, C]`, whole regions only for the eager form's sake."""
    rows, cols = (n // 256 for n in (GRIDS[regions].height, GRIDS[regions].width))
    grid = RegionGrid(rows * 256, cols * 256, 256)
    if layout == "rows":
        return grid, torch.randn(rows * cols, 8, 8, CHANNELS, device=DEVICE, dtype=DTYPE)
    maps = torch.randn(rows * cols, CHANNELS, 8, 8, device=DEVICE, dtype=DTYPE)
    return grid, maps.permute(0, 2, 3, 1)


def position_table(grid):
    """`[L, C]`: what the eager form needs made before."""
    rows, cols = grid.token_shape(32)
    table = torch.empty(rows, cols, CHANNELS, device=DEVICE, dtype=DTYPE)
    col = torch.arange(cols)
    for row in range(rows):
        table[row] = xk.sincos_position(torch.full_like(col, row), col, CHANNELS)
    return table.view(-1, CHANNELS)


def stitch_by_views(maps, grid):
    blocks = maps.view(grid.rows, grid.cols, 8, 8, CHANNELS).permute(0, 2, 1, 3, 4)
    return blocks.reshape(-1, CHANNELS)


@regions
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_stitch(benchmark, layout, regions):
    grid, maps = token_maps(layout, regions)
    table = position_table(grid)
    num_bytes = 2 * maps.numel() * maps.element_size()
    compare(
        benchmark,
        lambda: xk.stitch_regions(maps, grid, channels_last=True),
        {"views and a table": lambda: stitch_by_views(maps, grid) + table},
        num_bytes, op="stitch_regions", variant=layout, regions=grid.num_regions,
        units=(grid.num_regions, "regions"),
    )  # fmt: skip


@regions
def test_stitch_backward(benchmark, regions):
    grid, maps = token_maps("rows", regions)
    maps.requires_grad_()
    grad = torch.randn(maps.numel() // CHANNELS, CHANNELS, device=DEVICE, dtype=DTYPE)
    ours = backward_of(lambda: xk.stitch_regions(maps, grid, channels_last=True), [maps], grad)
    eager = backward_of(lambda: stitch_by_views(maps, grid), [maps], grad)
    compare(
        benchmark, ours, {"views": eager}, 2 * maps.numel() * maps.element_size(),
        op="stitch_regions", variant="backward", regions=grid.num_regions,
        units=(grid.num_regions, "regions"),
    )  # fmt: skip


LONG = [16_384, *full_only(131_072)] if HAS_GPU else [4096, *full_only(16_384)]
LENGTHS = [16_384, *full_only(131_072)] if HAS_GPU else [1024, *full_only(4096)]


def attention_inputs(length, head_dim, memory_gradient):
    """(query, key, value, memory_key, memory_value) of 768 channels, as many of memory."""
    shape = (1, 768 // head_dim, length, head_dim)
    return [
        torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_(wanted)
        for wanted in (True, True, True, memory_gradient, memory_gradient)
    ]


def attend_eagerly(query, key, value, memory_key, memory_value):
    """PyTorch's attention after the concatenation."""
    keys, values = torch.cat([memory_key, key], 2), torch.cat([memory_value, value], 2)
    return scaled_dot_product_attention(query, keys, values)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_xl_attention(benchmark, length, head_dim):
    tensors = [t.detach() for t in attention_inputs(length, head_dim, False)]
    compare(
        benchmark, lambda: xk.xl_attention(*tensors),
        {"sdpa after a concat": lambda: attend_eagerly(*tensors)},
        flops=4 * 768 * length * 2 * length, op="xl_attention",
        variant=f"forward, head dim {head_dim}", length=length, units=(length, "tokens"),
    )  # fmt: skip


@pytest.mark.parametrize("memory", ["detached", "with gradient"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_xl_attention_backward(benchmark, head_dim, memory):
    length = LENGTHS[0]
    tensors = attention_inputs(length, head_dim, memory != "detached")
    wanted = [t for t in tensors if t.requires_grad]
    grad = torch.randn_like(tensors[0])
    ours, eager = (
        backward_of(lambda form=form: form(*tensors), wanted, grad)
        for form in (xk.xl_attention, attend_eagerly)
    )
    compare(
        benchmark, ours, {"sdpa after a concat": eager}, op="xl_attention",
        variant=f"backward, head dim {head_dim}, memory {memory}", length=length,
        units=(length, "tokens"),
    )  # fmt: skip


HYPER = [16_384, 131_072, *full_only(714_000)] if HAS_GPU else [4096, *full_only(16_384, 32_768)]
# Shorter than by default, so that the estimate is what is measured at every length.
HYPER_LEAST = 1024


@pytest.mark.parametrize("is_causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("length", HYPER)
def test_hyper_attention(benchmark, request, length, is_causal):
    """Against exact attention, and HyperAttention as published; errors are on clustered inputs."""
    tensors = [t.to(DEVICE, DTYPE) for t in clustered((1, 12, length, 64))]
    wanted, skipped = dict(EXACT_ATTENTION), {}
    if not (HAS_GPU or request.config.getoption("--full")):
        wanted.pop("flex_attention")
        skipped["flex_attention"] = "half a minute to compile on a CPU: with --full only"
    forms, absent = available(wanted, *tensors, is_causal=is_causal)
    max_error = dict.fromkeys(forms, 1e-2)
    clusters = {"window": "cluster", "residual": "mean"}
    for name, options in (("ours", {}), ("ours, clusters", clusters)):
        forms[name] = partial(xk.hyper_attention, min_seq_len=HYPER_LEAST, **options)
    if is_causal and length & (length - 1):
        absent["hyper, published"] = "its halves must be even"
    else:
        forms["hyper, published"] = published_hyper_attention
    max_error |= dict.fromkeys([name for name in forms if name not in max_error], 0.6)
    runs = {name: partial(form, *tensors, is_causal=is_causal) for name, form in forms.items()}
    compare(
        benchmark, runs.pop("ours"), runs, truth=runs["sdpa"](), max_error=max_error,
        absent=absent | skipped,
        flops=4 * 768 * length * (512 if not is_causal else min(length, HYPER_LEAST) / 2 + 256),
        op="hyper_attention", variant="causal" if is_causal else "all keys", length=length,
        units=(length, "tokens"), rounds=5,
    )  # fmt: skip


@pytest.mark.parametrize("length", HYPER)
def test_hyper_attention_backward(benchmark, length):
    """Forward and backward; on a CPU exact attention is held against ours at the same length."""
    tensors = [t.to(DEVICE, DTYPE).requires_grad_() for t in clustered((1, 12, length, 64))]
    grad = torch.randn_like(tensors[0])
    ours = partial(xk.hyper_attention, min_seq_len=HYPER_LEAST)

    def both(form):
        return lambda: torch.autograd.grad(form(*tensors), tensors, grad)

    def query_gradient(form):
        return torch.autograd.grad(form(*tensors), tensors[0], grad)[0]

    exact = both(scaled_dot_product_attention)
    runs = {"sdpa": lambda: exact()[0], "ours": lambda: both(ours)()[0]}
    compare(
        benchmark, runs["ours"], {"sdpa": runs["sdpa"]},
        truth=query_gradient(scaled_dot_product_attention), max_error={"sdpa": 1e-2},
        op="hyper_attention", variant="forward and backward", length=length,
        units=(length, "tokens"), rounds=5,
    )  # fmt: skip


@pytest.mark.parametrize("length", HYPER)
@pytest.mark.parametrize("window", ["lsh", "cluster"])
def test_hyper_attention_plan(benchmark, window, length):
    """Buckets and orders alone, against PyTorch's hash and stable sort of queries and keys."""
    query, key, _ = (t.to(DEVICE, DTYPE) for t in clustered((1, 12, length, 64)))
    directions = torch.randn(64, 7, device=DEVICE, dtype=DTYPE)

    # Orders differ, but each is one of all tokens: their sums do not.
    def ours():
        made = xk.make_plan(query, key, min_seq_len=0, window=window).choices
        return [order.sum(-1).double() for order in (made.query_order, made.key_order)]

    def sorts():
        orders = (hashes(t, directions).argsort(dim=-1, stable=True) for t in (query, key))
        return [order.sum(-1).double() for order in orders]

    compare(
        benchmark, ours, {"hash and sort": sorts}, op="hyper_attention", variant=f"plan, {window}",
        length=length, units=(length, "tokens"), rounds=5,
    )  # fmt: skip


# d_inner and N of the paper's Mamba; the eager form goes through every token by itself.
INNER, STATES = (1536, 16) if HAS_GPU else (96, 16)
SCANS = [16_384, *full_only(131_072)] if HAS_GPU else [2048, *full_only(8192)]


def scan_inputs(length, wanted=False):
    """Arguments of `selective_scan` in its own order, up to delta_bias."""
    shapes = {
        "u": (1, INNER, length),
        "delta": (1, INNER, length),
        "A": (INNER, STATES),
        "B": (1, STATES, length),
        "C": (1, STATES, length),
        "D": (INNER,),
        "z": (1, INNER, length),
        "delta_bias": (INNER,),
    }
    made = {}
    for name, shape in shapes.items():
        dtype = torch.float32 if name in ("A", "D", "delta_bias") else DTYPE
        made[name] = torch.randn(shape, device=DEVICE, dtype=dtype)
    made["A"] = -made["A"].abs() * 4
    made["delta_bias"] -= 4
    return [t.requires_grad_(wanted) for t in made.values()]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("length", SCANS)
def test_selective_scan(benchmark, length, backward):
    tensors = scan_inputs(length, wanted=backward)
    forms = {"token by token": reference.selective_scan, "mamba_ssm": mamba_ssm_scan}
    grad = torch.randn_like(tensors[0])

    def of(form):
        call = partial(form, *tensors, delta_softplus=True)
        return backward_of(call, tensors, grad) if backward else call

    run, absent = available(forms, *tensors, delta_softplus=True)
    compare(
        benchmark, of(xk.selective_scan), {name: of(form) for name, form in run.items()},
        absent=absent, op="selective_scan", variant="backward" if backward else "forward",
        length=length, units=(length, "tokens"), rounds=5,
    )  # fmt: skip


@torch.no_grad()
def test_selective_scan_time_a_token(benchmark):
    """Flat over the length; what states cost, and a run in 16 parts against one call."""
    lengths = [4096, 16_384, 65_536, *([131_072, 1_048_576] if HAS_GPU else [])]
    scan = partial(xk.selective_scan, delta_softplus=True)
    per_token = {}
    for length in lengths:
        tensors = scan_inputs(length)
        scan(*tensors)
        per_token[str(length)] = min(seconds(lambda t=tensors: scan(*t)) for _ in range(5)) / length
    length = 131_072 if HAS_GPU else 65_536
    whole = scan_inputs(length)
    state = torch.zeros(*whole[0].shape[:2], STATES, device=DEVICE)

    def with_states():
        return scan(*whole, initial_state=state, return_last_state=True)[0]

    def parts():
        last, outs = state, []
        for part in range(16):
            at = slice(part * length // 16, (part + 1) * length // 16)
            piece = [t[..., at] if t.dim() == 3 else t for t in whole]
            out, last = scan(*piece, initial_state=last, return_last_state=True)
            outs.append(out)
        return torch.cat(outs, -1)

    benchmark.extra_info["seconds_a_token"] = per_token
    compare(
        benchmark, lambda: scan(*whole), {"with states": with_states, "in 16 parts": parts},
        op="selective_scan", variant="states", length=length, units=(length, "tokens"), rounds=5,
    )  # fmt: skip
