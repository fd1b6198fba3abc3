"""The kernels against the best eager form, in one process.

    pytest bench/bench_kernels.py --benchmark-only

An answer is checked before it is timed. `extra_info` holds the time of the eager form measured in
turns with ours, their ratio, and on a GPU the ratio to a copy of as many bytes (`floor_ratio`: 1 is
the bandwidth of a copy). Sizes are small on a CPU and full on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

import xt_kernels as xk
from xt_kernels import RegionGrid, reference

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# Low precision where the GPU is meant to be used so; CPUs are measured in fp32.
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
GRID = RegionGrid(29_000, 25_000, 256) if HAS_GPU else RegionGrid(1024, 1024, 256)
CHANNELS = 768
NORM = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def seconds(run: Callable[[], object]) -> float:
    """Time of one call, which on a GPU has finished."""
    if not HAS_GPU:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # A full queue, so that the launch is not what is measured.
    torch.cuda._sleep(2_000_000)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def compare(benchmark, ours, eager, num_bytes=None, rounds=15):
    """Times both in turns and notes the medians; the benchmark's own table shows ours."""
    ours(), eager()
    times: dict[str, list[float]] = {"ours": [], "eager": [], "copy": []}
    source = target = None
    if HAS_GPU and num_bytes:
        # A copy reads and writes: half of the bytes each way.
        source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
    for _ in range(rounds):
        times["ours"].append(seconds(ours))
        times["eager"].append(seconds(eager))
        if source is not None:
            times["copy"].append(seconds(lambda: target.copy_(source)))
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    benchmark.extra_info["seconds"] = medians
    benchmark.extra_info["eager_over_ours"] = medians["eager"] / medians["ours"]
    if "copy" in medians:
        benchmark.extra_info["floor_ratio"] = medians["copy"] / medians["ours"]

    def finished():
        ours()
        if HAS_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=rounds, warmup_rounds=1)


def agree(ours, eager):
    """The two answers are equal to the precision of their dtype; few at a time, to save memory."""
    step = max(1, 2**26 // max(1, ours[0].numel()))
    for first in range(0, len(ours), step):
        a, b = (x[first : first + step].float() for x in (ours, eager))
        torch.testing.assert_close(a, b, atol=2e-2 if DTYPE == torch.bfloat16 else 1e-5, rtol=1e-2)


def cut_eagerly(image, dtype):
    """Regions `[R, C, s, s]` of `[C, h, w]` by views: pad and order bytes, cast, scale, cast."""
    side, rows, cols = GRID.region, GRID.rows, GRID.cols
    padding = (0, cols * side - image.shape[2], 0, rows * side - image.shape[1])
    gain = torch.tensor([1 / 255 / s for s in NORM["std"]])[:, None, None].to(DEVICE)
    bias = [-m / s for m, s in zip(NORM["mean"], NORM["std"], strict=True)]
    padded = torch.nn.functional.pad(image, padding) if any(padding) else image.contiguous()
    blocks = padded.unflatten(2, (cols, side)).unflatten(1, (rows, side)).permute(1, 3, 0, 2, 4)
    out = blocks.to(torch.float32, memory_format=torch.contiguous_format).mul_(gain)
    out.add_(torch.tensor(bias)[:, None, None].to(DEVICE))
    if any(padding):
        # Zero after normalisation, as ours.
        inside = torch.ones(1, *image.shape[1:], dtype=torch.bool, device=DEVICE)
        inside = torch.nn.functional.pad(inside, padding)
        inside = inside.unflatten(2, (cols, side)).unflatten(1, (rows, side))
        out.mul_(inside.permute(1, 3, 0, 2, 4))
    return out.to(dtype).view(-1, 3, side, side)


@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_extract(benchmark, layout):
    shape = (3, GRID.height, GRID.width)
    image = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    last = layout == "pixels"
    if last:
        image = image.permute(1, 2, 0).contiguous()
    planes = image.permute(2, 0, 1) if last else image

    def ours():
        return xk.extract_regions(image, GRID, channels_last=last, dtype=DTYPE, **NORM)

    def eager():
        return cut_eagerly(planes, DTYPE)

    out = ours()
    agree(out, eager())
    compare(benchmark, ours, eager, image.numel() + out.numel() * out.element_size())


def test_extract_backward(benchmark):
    image = torch.randn(3, 1024, 1024, device=DEVICE, dtype=DTYPE, requires_grad=True)
    grid = RegionGrid(1024, 1024, 256)
    cut = xk.extract_regions(image, grid, std=NORM["std"], dtype=DTYPE)
    grad = torch.randn_like(cut)
    gain = torch.tensor([1 / s for s in NORM["std"]], device=DEVICE, dtype=DTYPE)[:, None, None]

    def ours():
        return torch.autograd.grad(cut, image, grad, retain_graph=True)[0]

    def eager():
        blocks = (grad * gain).view(4, 4, 3, 256, 256).permute(2, 0, 3, 1, 4)
        return blocks.reshape(3, 1024, 1024)

    agree(ours(), eager())
    compare(benchmark, ours, eager, 2 * grad.numel() * grad.element_size())


def token_maps(layout):
    """Features `[R, 8, 8, C]`, whole regions only for the eager form's sake."""
    rows, cols = GRID.height // 256, GRID.width // 256
    grid = RegionGrid(rows * 256, cols * 256, 256)
    shape = (rows * cols, 8, 8, CHANNELS)
    if layout == "rows":
        return grid, torch.randn(shape, device=DEVICE, dtype=DTYPE)
    shape = (rows * cols, CHANNELS, 8, 8)
    return grid, torch.randn(shape, device=DEVICE, dtype=DTYPE).permute(0, 2, 3, 1)


def position_table(grid):
    """`[L, C]`: what the eager form needs made before."""
    rows, cols = grid.token_shape(32)
    table = torch.empty(rows, cols, CHANNELS, device=DEVICE, dtype=DTYPE)
    col = torch.arange(cols)
    for row in range(rows):
        table[row] = xk.sincos_position(torch.full_like(col, row), col, CHANNELS)
    return table.view(-1, CHANNELS)


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_stitch(benchmark, layout):
    grid, maps = token_maps(layout)
    table = position_table(grid)
    buffer = torch.empty_like(table)

    def ours():
        return xk.stitch_regions(maps, grid, channels_last=True, out=buffer)

    def eager():
        blocks = maps.view(grid.rows, grid.cols, 8, 8, CHANNELS).permute(0, 2, 1, 3, 4)
        return blocks.reshape(-1, CHANNELS) + table

    agree(ours(), eager())
    compare(benchmark, ours, eager, 2 * maps.numel() * maps.element_size())


def test_stitch_backward(benchmark):
    grid, maps = token_maps("rows")
    maps.requires_grad_()
    tokens = xk.stitch_regions(maps, grid, channels_last=True)
    grad = torch.randn_like(tokens)

    def ours():
        return torch.autograd.grad(tokens, maps, grad, retain_graph=True)[0]

    def eager():
        blocks = grad.view(grid.rows, 8, grid.cols, 8, CHANNELS).permute(0, 2, 1, 3, 4)
        return blocks.reshape(maps.shape)

    agree(ours(), eager())
    compare(benchmark, ours, eager, 2 * maps.numel() * maps.element_size())


LENGTH, MEMORY = (16_384, 16_384) if HAS_GPU else (1024, 1024)


def attention_inputs(head_dim, memory_gradient):
    """(query, key, value, memory_key, memory_value) of 768 channels."""
    sizes = [LENGTH, LENGTH, LENGTH, MEMORY, MEMORY]
    wanted = [True, True, True, memory_gradient, memory_gradient]
    return [
        torch.randn(1, 768 // head_dim, size, head_dim, device=DEVICE, dtype=DTYPE).requires_grad_(
            w
        )
        for size, w in zip(sizes, wanted, strict=True)
    ]


def attend_eagerly(query, key, value, memory_key, memory_value):
    """PyTorch's attention after the concatenation."""
    keys, values = torch.cat([memory_key, key], 2), torch.cat([memory_value, value], 2)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_xl_attention(benchmark, head_dim):
    tensors = [t.detach() for t in attention_inputs(head_dim, False)]

    def ours():
        return xk.xl_attention(*tensors)

    def eager():
        return attend_eagerly(*tensors)

    agree(ours(), eager())
    compare(benchmark, ours, eager)


@pytest.mark.parametrize("memory", ["detached", "with gradient"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_xl_attention_backward(benchmark, head_dim, memory):
    tensors = attention_inputs(head_dim, memory != "detached")
    wanted = [t for t in tensors if t.requires_grad]
    outs = {f: f(*tensors) for f in (xk.xl_attention, attend_eagerly)}
    grad = torch.randn_like(tensors[0])

    def backward(form):
        return torch.autograd.grad(outs[form], wanted, grad, retain_graph=True)

    def ours():
        return backward(xk.xl_attention)

    def eager():
        return backward(attend_eagerly)

    for a, b in zip(ours(), eager(), strict=True):
        agree(a, b)
    compare(benchmark, ours, eager)


# d_inner and N of the paper's Mamba; the eager form goes through every token by itself.
INNER, STATES = (1536, 16) if HAS_GPU else (384, 16)
SCAN_LENGTH = 8192


def scan_inputs(length, wanted=False, inner=INNER):
    """Arguments of `selective_scan` in its own order, up to delta_bias."""
    shapes = {
        "u": (1, inner, length),
        "delta": (1, inner, length),
        "A": (inner, STATES),
        "B": (1, STATES, length),
        "C": (1, STATES, length),
        "D": (inner,),
        "z": (1, inner, length),
        "delta_bias": (inner,),
    }
    made = {}
    for name, shape in shapes.items():
        dtype = torch.float32 if name in ("A", "D", "delta_bias") else DTYPE
        made[name] = torch.randn(shape, device=DEVICE, dtype=dtype)
    made["A"] = -made["A"].abs() * 4
    made["delta_bias"] -= 4
    return [t.requires_grad_(wanted) for t in made.values()]


def scan(form, tensors, **options):
    return form(*tensors, delta_softplus=True, **options)


@pytest.mark.parametrize("backward", [False, True])
def test_selective_scan(benchmark, backward):
    tensors = scan_inputs(SCAN_LENGTH, wanted=backward)

    def run(form):
        out = scan(form, tensors)
        if not backward:
            return [out]
        return [out.detach(), *torch.autograd.grad(out.float().square().mean(), tensors)]

    def ours():
        return run(xk.selective_scan)

    def eager():
        return run(reference.selective_scan)

    for a, b in zip(ours(), eager(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=2e-2 if HAS_GPU else 1e-4, rtol=1e-2)
    compare(benchmark, ours, eager, rounds=3)


@pytest.mark.parametrize("backward", [False, True])
def test_selective_scan_against_mamba_ssm(benchmark, backward):
    pytest.importorskip("mamba_ssm", reason="mamba_ssm is not installed")
    if not HAS_GPU:
        pytest.skip("mamba_ssm has no CPU form")
    tensors = scan_inputs(131_072, wanted=backward)

    def run(backend):
        out = scan(xk.selective_scan, tensors, backend=backend)
        return torch.autograd.grad(out.sum(), tensors) if backward else [out]

    for a, b in zip(run("xt"), run("mamba_ssm"), strict=True):
        agree(a, b)
    compare(benchmark, lambda: run("xt"), lambda: run("mamba_ssm"))


@torch.no_grad()
def test_selective_scan_time_a_token(benchmark):
    """Flat over the length; what states cost, and a run in 16 parts against one call."""
    lengths = [4096, 16_384, 65_536, 131_072, *([1_048_576] if HAS_GPU else [])]
    per_token = {}
    for length in lengths:
        tensors = scan_inputs(length, inner=INNER if HAS_GPU else 96)
        scan(xk.selective_scan, tensors)
        times = [seconds(lambda t=tensors: scan(xk.selective_scan, t)) for _ in range(5)]
        per_token[str(length)] = min(times) / length
    whole = scan_inputs(131_072, inner=INNER if HAS_GPU else 96)
    state = torch.zeros(*whole[0].shape[:2], STATES, device=DEVICE)

    def one():
        return scan(xk.selective_scan, whole)

    def with_states():
        return scan(xk.selective_scan, whole, initial_state=state, return_last_state=True)

    def parts():
        last, outs = state, []
        for i in range(16):
            at = slice(i * 8192, i * 8192 + 8192)
            piece = [t[..., at] if t.dim() == 3 else t for t in whole]
            out, last = scan(xk.selective_scan, piece, initial_state=last, return_last_state=True)
            outs.append(out)
        return outs

    agree(torch.cat(parts(), -1)[0], one()[0])
    rounds = [[seconds(f) for f in (one, with_states, parts)] for _ in range(5)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    benchmark.extra_info["seconds_a_token"] = per_token
    benchmark.extra_info["states_over_none"] = medians[1] / medians[0]
    benchmark.extra_info["parts_over_one"] = medians[2] / medians[0]
    benchmark.pedantic(one, rounds=3)
