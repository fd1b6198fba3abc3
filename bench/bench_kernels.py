"""The kernels against the best eager form, in one process, in turns (see `measure.compare`).

    pytest bench/bench_kernels.py --benchmark-only
    pytest bench/bench_kernels.py --benchmark-only --full   # other dtypes, longer, compiled forms

Sizes are small on a CPU and full on a GPU.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from baselines import (
    EXACT_ATTENTION,
    attend,
    available,
    hashes,
    mamba_ssm_scan,
    published_hyper_attention,
)
from inputs import clustered, relative_error
from measure import DEVICE, DTYPE, HAS_GPU, Backward, compare, full_only, seconds
from torch.nn.functional import pad, scaled_dot_product_attention

import xt_kernels as xk
from xt_kernels import RegionGrid, reference

pytestmark = pytest.mark.timeout(3600)
OTHERS = [torch.float16, torch.float32] if HAS_GPU else [torch.bfloat16]
dtypes = pytest.mark.parametrize(
    "dtype", [DTYPE, *full_only(*OTHERS)], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
SIZES = [(29_000, 25_000)] if HAS_GPU else [(256, 256), (1024, 1024), (2048, 2048)]
GRIDS = {grid.num_regions: grid for grid in (RegionGrid(*size, 256) for size in SIZES)}
CHANNELS = 768
NORM = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
COUNTS = list(GRIDS)
regions = pytest.mark.parametrize("regions", [*COUNTS[:2], *full_only(*COUNTS[2:])])


@pytest.fixture
def twins(request):
    """An eager form under its name and, with --full, its twin under torch.compile."""

    def both(name, form):
        found = {name: form}
        if request.config.getoption("--full"):
            found[f"{name}, compiled"] = torch.compile(form, dynamic=False)
        return found

    return both


def size_of(*tensors):
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors)


def a_channel(values):
    """`[C, 1, 1]`."""
    return torch.tensor(values, device=DEVICE)[:, None, None]


GAIN = a_channel([1 / 255 / s for s in NORM["std"]])
BIAS = a_channel([-m / s for m, s in zip(NORM["mean"], NORM["std"], strict=True)])


def cut_by_views(image, grid, dtype):
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
    return out.to(dtype).view(-1, 3, side, side)


@dtypes
@regions
@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_extract(benchmark, twins, layout, regions, dtype):
    grid = GRIDS[regions]
    image = torch.randint(256, (3, grid.height, grid.width), dtype=torch.uint8, device=DEVICE)
    last = layout == "pixels"
    if last:
        image = image.permute(1, 2, 0).contiguous()
    planes = image.permute(2, 0, 1) if last else image

    def ours():
        return xk.extract_regions(image, grid, channels_last=last, dtype=dtype, **NORM)

    num_bytes = image.numel() + regions * 3 * 256**2 * dtype.itemsize
    compare(
        benchmark, ours, twins("views", lambda: cut_by_views(planes, grid, dtype)), num_bytes,
        op="extract_regions", variant=layout, regions=regions, batch=1, channels=3, dtype=dtype,
        units=(regions, "regions"),
    )  # fmt: skip


@dtypes
@regions
def test_extract_backward(benchmark, twins, regions, dtype):
    # Whole regions, as many a side as the square root tells.
    side = min(round(regions**0.5), 8)
    grid = RegionGrid(side * 256, side * 256, 256)
    shape = (3, grid.height, grid.width)
    image = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    gain = (1 / a_channel(NORM["std"])).to(dtype)
    grad = torch.randn(grid.num_regions, 3, 256, 256, device=DEVICE, dtype=dtype)

    def cut():
        return xk.extract_regions(image, grid, std=NORM["std"], dtype=dtype)

    def views():
        blocks = image.view(3, side, 256, side, 256).permute(1, 3, 0, 2, 4)
        return (blocks * gain).reshape(-1, 3, 256, 256)

    others = {name: Backward(form, [image], grad) for name, form in twins("views", views).items()}
    compare(
        benchmark, Backward(cut, [image], grad), others, 2 * size_of(grad),
        op="extract_regions", variant="backward", regions=grid.num_regions, batch=1, channels=3,
        dtype=dtype, units=(grid.num_regions, "regions"),
    )  # fmt: skip


def token_maps(layout, regions, dtype):
    """Features `[R, 8, 8, C]`, whole regions only for the eager form's sake."""
    rows, cols = (n // 256 for n in (GRIDS[regions].height, GRIDS[regions].width))
    grid = RegionGrid(rows * 256, cols * 256, 256)
    if layout == "rows":
        return grid, torch.randn(rows * cols, 8, 8, CHANNELS, device=DEVICE, dtype=dtype)
    maps = torch.randn(rows * cols, CHANNELS, 8, 8, device=DEVICE, dtype=dtype)
    return grid, maps.permute(0, 2, 3, 1)


def position_table(grid, dtype):
    """`[L, C]`: what the eager form needs made before."""
    rows, cols = grid.token_shape(32)
    table = torch.empty(rows, cols, CHANNELS, device=DEVICE, dtype=dtype)
    col = torch.arange(cols)
    for row in range(rows):
        table[row] = xk.sincos_position(torch.full_like(col, row), col, CHANNELS)
    return table.view(-1, CHANNELS)


def stitch_by_views(maps, grid):
    blocks = maps.view(grid.rows, grid.cols, 8, 8, CHANNELS).permute(0, 2, 1, 3, 4)
    return blocks.reshape(-1, CHANNELS)


@dtypes
@regions
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_stitch(benchmark, twins, layout, regions, dtype):
    grid, maps = token_maps(layout, regions, dtype)
    table = position_table(grid, dtype)
    compare(
        benchmark,
        lambda: xk.stitch_regions(maps, grid, channels_last=True),
        twins("views and a table", lambda: stitch_by_views(maps, grid) + table),
        2 * size_of(maps), op="stitch_regions", variant=layout, regions=grid.num_regions, batch=1,
        channels=CHANNELS, dtype=dtype, units=(grid.num_regions, "regions"),
    )  # fmt: skip


@dtypes
@regions
def test_stitch_backward(benchmark, twins, regions, dtype):
    grid, maps = token_maps("rows", regions, dtype)
    maps.requires_grad_()
    grad = torch.randn(maps.numel() // CHANNELS, CHANNELS, device=DEVICE, dtype=dtype)
    eager = twins("views", lambda: stitch_by_views(maps, grid))
    compare(
        benchmark,
        Backward(lambda: xk.stitch_regions(maps, grid, channels_last=True), [maps], grad),
        {name: Backward(form, [maps], grad) for name, form in eager.items()},
        2 * size_of(maps), op="stitch_regions", variant="backward", regions=grid.num_regions,
        batch=1, channels=CHANNELS, dtype=dtype, units=(grid.num_regions, "regions"),
    )  # fmt: skip


WIDTH = 768  # heads * head dim
LENGTHS = [16_384, *full_only(131_072)] if HAS_GPU else [1024, 4096]


def attention_inputs(length, head_dim, memory_gradient, dtype):
    """(query, key, value, memory_key, memory_value) of 768 channels, as many of memory."""
    shape = (1, WIDTH // head_dim, length, head_dim)
    return [
        torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(wanted)
        for wanted in (True, True, True, memory_gradient, memory_gradient)
    ]


def attend_eagerly(query, key, value, memory_key, memory_value):
    """PyTorch's attention after the concatenation."""
    keys, values = torch.cat([memory_key, key], 2), torch.cat([memory_value, value], 2)
    return scaled_dot_product_attention(query, keys, values)


@dtypes
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_xl_attention(benchmark, twins, length, head_dim, dtype):
    tensors = [t.detach() for t in attention_inputs(length, head_dim, False, dtype)]
    compare(
        benchmark, lambda: xk.xl_attention(*tensors),
        twins("sdpa after a concat", lambda: attend_eagerly(*tensors)),
        size_of(*tensors, tensors[0]), flops=4 * WIDTH * length * 2 * length, op="xl_attention",
        variant=f"forward, head dim {head_dim}", length=length, batch=1, heads=WIDTH // head_dim,
        head_dim=head_dim, dtype=dtype, units=(length, "tokens"),
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("memory", ["detached", "with gradient"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "length", [LENGTHS[0], *full_only(*LENGTHS[1:2])] if not HAS_GPU else LENGTHS
)
def test_xl_attention_backward(benchmark, length, head_dim, memory, dtype):
    tensors = attention_inputs(length, head_dim, memory != "detached", dtype)
    wanted = [t for t in tensors if t.requires_grad]
    grad = torch.randn_like(tensors[0])
    ours, eager = (
        Backward(partial(form, *tensors), wanted, grad)
        for form in (xk.xl_attention, attend_eagerly)
    )
    # Scores, their gradient and that of the query over all keys; dK and dV where they are wanted.
    products = 3 * 2 * length + 2 * length * (2 if memory != "detached" else 1)
    compare(
        benchmark, ours, {"sdpa after a concat": eager}, size_of(*tensors, grad, grad, *wanted),
        flops=2 * WIDTH * length * products, op="xl_attention",
        variant=f"backward, head dim {head_dim}, memory {memory}", length=length, batch=1,
        heads=WIDTH // head_dim, head_dim=head_dim, dtype=dtype, units=(length, "tokens"),
    )  # fmt: skip


HYPER_LENGTHS = {
    "cuda": [16_384, 131_072, *full_only(716_800)],
    "cpu": [4096, 16_384, *full_only(32_768)],
}
HYPER = HYPER_LENGTHS[DEVICE]
# Its backward pass of exact attention takes a minute at 16,384 tokens on a CPU.
HYPER_BACKWARD = HYPER if HAS_GPU else [4096, *full_only(16_384, 32_768)]
# Shorter than by default, so that the estimate is what is measured at every length.
HYPER_LEAST = 1024
HEADS, HEAD_DIM = 12, 64
ESTIMATES = {"ours": {}, "ours, clusters": {"window": "cluster", "residual": "mean"}}
HYPER_FACTS = {"op": "hyper_attention", "batch": 1, "heads": HEADS, "head_dim": HEAD_DIM}


def hyper_inputs(length, dtype):
    return [t.to(DEVICE, dtype) for t in clustered((1, HEADS, length, HEAD_DIM))]


def exact_pairs(length, is_causal):
    """Pairs of a query and a key of one head in exact attention."""
    return length * (length + 1) // 2 if is_causal else length**2


def estimated_pairs(query, key, is_causal):
    """Pairs that ours scores: a window and residual keys a query, and exact triangles."""
    plan = xk.make_plan(query, key, is_causal=is_causal, min_seq_len=HYPER_LEAST)
    found = 0 if plan.levels else exact_pairs(query.shape[2], is_causal)
    for level in plan.levels:
        for segment in range(level.segments):
            queries, keys = (
                p.stop - p.start for p in (level.queries(segment), level.keys(segment))
            )
            if not level.is_exact:
                found += queries * (level.width + level.num_residual)
            else:
                found += exact_pairs(queries, True) if level.is_causal else queries * keys
    return found


def calls():
    """Lengths, causal or not; on a CPU causal calls of 16,384 tokens take long, too."""
    for length, kind in product(HYPER, ("all keys", "causal")):
        value, marks = length, []
        if not isinstance(length, int):  # with --full only
            (value,), marks = length.values, list(length.marks)
        if not HAS_GPU and kind == "causal" and value > 4096:
            marks = [pytest.mark.full]
        yield pytest.param(value, kind == "causal", marks=marks, id=f"{value}-{kind}")


@dtypes
@pytest.mark.parametrize("length, is_causal", calls())
def test_hyper_attention(benchmark, request, length, is_causal, dtype):
    """Against exact attention, and HyperAttention as published; errors are on clustered inputs."""
    tensors = hyper_inputs(length, dtype)
    full = request.config.getoption("--full")
    wanted, skipped = dict(EXACT_ATTENTION), {}
    if not (HAS_GPU or full):
        wanted.pop("flex_attention")
        skipped["flex_attention"] = "half a minute to compile on a CPU: with --full only"
        if length > 4096:
            wanted.pop("sdpa flash")
            skipped["sdpa flash"] = "what sdpa takes on a CPU: at this length with --full only"
    if full and not is_causal:
        wanted["dense, compiled"] = torch.compile(
            lambda *t, is_causal: attend(*t, HEAD_DIM**-0.5)[0], dynamic=False
        )
    # What runs at all shows on a few tokens; a CPU has memory for no more of some.
    few = tensors if HAS_GPU else [t[:, :, :64] for t in tensors]
    forms, absent = available(wanted, *few, is_causal=is_causal)
    max_error = dict.fromkeys(forms, 1e-2)
    pairs = dict.fromkeys(forms, exact_pairs(length, is_causal))
    for name, options in ESTIMATES.items():
        forms[name] = partial(xk.hyper_attention, min_seq_len=HYPER_LEAST, **options)
    if is_causal and length & (length - 1):
        absent["hyper, published"] = "its halves must be multiples of the block"
    else:
        # At its default, 4,096, it would be exact where ours estimates.
        forms["hyper, published"] = partial(published_hyper_attention, min_seq_len=HYPER_LEAST)
    estimates = [name for name in forms if name not in max_error]
    max_error |= dict.fromkeys(estimates, 0.6)
    pairs |= dict.fromkeys(estimates, estimated_pairs(*tensors[:2], is_causal))
    runs = {name: partial(form, *tensors, is_causal=is_causal) for name, form in forms.items()}
    compare(
        benchmark, runs.pop("ours"), runs, size_of(*tensors, tensors[0]), truth="sdpa",
        max_error=max_error, absent=absent | skipped,
        flops={name: 4 * WIDTH * count for name, count in pairs.items()},
        variant="causal" if is_causal else "all keys", length=length, dtype=dtype,
        units=(length, "tokens"), rounds=5, **HYPER_FACTS,
    )  # fmt: skip


PARTS = ("out", "query", "key", "value")


def with_gradients(form, tensors, grad):
    """Output and all three gradients, in the order of `PARTS`."""
    out = form(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check_gradients(dtype, options):
    """Ours against the dense definition in fp64 on the same plan, at a length that allows it.

    Against exact attention no bound of a gradient says that it is right: an estimate may be far off
    with the right derivative. This one does; the bound is the rounding of the dtype.
    """
    tensors = [t.requires_grad_() for t in hyper_inputs(1024, dtype)]
    grad = torch.randn_like(tensors[0])
    plan = xk.make_plan(*tensors[:2], min_seq_len=0, **options)
    assert not plan.is_exact
    found = with_gradients(partial(xk.hyper_attention, plan=plan), tensors, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    truth = with_gradients(partial(reference.hyper_attention, plan=plan), wide, grad.double())
    most = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, one, other in zip(PARTS, found, truth, strict=True):
        error = relative_error(one, other)
        assert error <= most, f"hyper_attention: {name} is off by {error:.2g} of its definition"


@dtypes
@pytest.mark.parametrize("length", HYPER_BACKWARD)
def test_hyper_attention_backward(benchmark, length, dtype):
    """Forward and backward against those of exact attention."""
    tensors = [t.requires_grad_() for t in hyper_inputs(length, dtype)]
    grad = torch.randn_like(tensors[0])
    forms = {"sdpa": scaled_dot_product_attention}
    for name, options in ESTIMATES.items():
        check_gradients(dtype, options)
        forms[name] = partial(xk.hyper_attention, min_seq_len=HYPER_LEAST, **options)
    runs = {name: partial(with_gradients, form, tensors, grad) for name, form in forms.items()}
    pairs = dict.fromkeys(forms, estimated_pairs(*(t.detach() for t in tensors[:2]), False))
    pairs["sdpa"] = exact_pairs(length, False)
    # With a share p of keys sampled, each takes the gradient of 1 / p keys and the others take
    # none: off by sqrt(1 / p - 1) if all mattered as much. Means reach every key; their bound is
    # the error of no gradient at all.
    sampled = (length / 256) ** 0.5
    max_error = {
        name: {"out": 0.6} | dict.fromkeys(PARTS[1:], most)
        for name, most in (("ours", sampled), ("ours, clusters", 1.0))
    }
    compare(
        benchmark, runs.pop("ours"), runs, size_of(*tensors, *tensors, grad, grad), truth="sdpa",
        parts=PARTS, max_error=max_error,
        flops={name: 14 * WIDTH * count for name, count in pairs.items()},
        variant="forward and backward", length=length, dtype=dtype, units=(length, "tokens"),
        rounds=5, **HYPER_FACTS,
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("length", HYPER)
@pytest.mark.parametrize("window", ["lsh", "cluster"])
def test_hyper_attention_plan(benchmark, window, length, dtype):
    """Buckets and orders alone, against PyTorch's hash and stable sort of queries and keys."""
    query, key, _ = hyper_inputs(length, dtype)
    directions = torch.randn(HEAD_DIM, 7, device=DEVICE, dtype=dtype)

    # Orders differ, but each is one of all tokens: their sums do not.
    def ours():
        made = xk.make_plan(query, key, min_seq_len=0, window=window).choices
        return [order.sum(-1).double() for order in (made.query_order, made.key_order)]

    def sorts():
        orders = (hashes(t, directions).argsort(dim=-1, stable=True) for t in (query, key))
        return [order.sum(-1).double() for order in orders]

    compare(
        benchmark, ours, {"hash and sort": sorts},
        # Queries and keys in, an index of 4 bytes for each of both out.
        size_of(query, key) + 2 * 4 * HEADS * length,
        variant=f"plan, {window}", length=length, dtype=dtype, units=(length, "tokens"), rounds=5,
        **HYPER_FACTS,
    )  # fmt: skip


# d_inner and N of the paper's Mamba; the eager form goes through every token by itself.
INNER, STATES = (1536, 16) if HAS_GPU else (96, 16)
SCANS = [16_384, *full_only(131_072)] if HAS_GPU else [2048, *full_only(64, 8192)]
SCAN_FACTS = {"op": "selective_scan", "batch": 1, "channels": INNER, "states": STATES}


def scan_inputs(length, wanted=False, dtype=DTYPE):
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
        own = torch.float32 if name in ("A", "D", "delta_bias") else dtype
        made[name] = torch.randn(shape, device=DEVICE, dtype=own)
    made["A"] = -made["A"].abs() * 4
    made["delta_bias"] -= 4
    return [t.requires_grad_(wanted) for t in made.values()]


@dtypes
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("length", SCANS)
def test_selective_scan(benchmark, request, length, backward, dtype):
    tensors = scan_inputs(length, wanted=backward, dtype=dtype)
    forms = {"token by token": reference.selective_scan, "mamba_ssm": mamba_ssm_scan}
    twin, skipped = "token by token, compiled", {}
    if length <= 64 and request.config.getoption("--full"):
        forms[twin] = torch.compile(reference.selective_scan, dynamic=False)
    else:
        skipped[twin] = "the loop unrolls: a graph of all tokens takes minutes past 64 of them"
    grad = torch.randn_like(tensors[0])

    def of(form):
        call = partial(form, *tensors, delta_softplus=True)
        return Backward(call, tensors, grad) if backward else call

    run, absent = available(forms, *tensors, delta_softplus=True)
    # Inputs in and the output out, or its gradient in and those of all inputs out.
    num_bytes = size_of(*tensors, grad) + (size_of(*tensors) if backward else 0)
    # Decay, input and output of each state; backward goes through them again, and back.
    flops = 9 * INNER * STATES * length * (3 if backward else 1)
    compare(
        benchmark, of(xk.selective_scan), {name: of(form) for name, form in run.items()},
        num_bytes, flops=flops, absent=absent | skipped,
        variant="backward" if backward else "forward", length=length, dtype=dtype,
        units=(length, "tokens"), rounds=5, **SCAN_FACTS,
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
        size_of(*whole, whole[0]), flops=9 * INNER * STATES * length, variant="states",
        length=length, units=(length, "tokens"), rounds=5, **SCAN_FACTS,
    )  # fmt: skip
