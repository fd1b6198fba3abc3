"""One model on one image in a process of its own: time, peak memory above the model, as JSON.

    python bench/whole_image.py --form "xt xl" --side 1024 --mode inference --encoder hiera_tiny

Forms: "xt CONTEXT" streams the image as `xt embed` does; "regions" is the region encoder alone, on
batches of regions; "naive" and "naive, window grown" are the same Swin on the whole image, its
window kept or grown with the image (side / 16, as in the paper). A training step is forward and
backward of the mean square of all tokens. Weights are random, and the same for all forms. On a GPU
all run under autocast to bf16.
"""

from __future__ import annotations

from xt_models.host import current_rss, keep_memory_flat, peak_rss, reset_peak_rss

keep_memory_flat()  # before torch loads

# ruff: noqa: E402
import argparse
import json
import statistics
import time
import warnings
from typing import Any

import numpy as np
import torch
from baselines import whole_image_swin
from measure import DEVICE, DTYPE, HAS_GPU, RECOMPUTED, context_of, seconds, spread, yardstick

import xt_models as xm
from xt_kernels import RegionGrid
from xt_models.registry import RandomWeightsWarning

REGION = 256  # px, whatever the encoder was made for
RECOMPUTE = 4  # regions at a time, in forms that do so


def build(form: str, encoder: str, side: int) -> tuple[Any, Any]:
    """(the model whose memory counts, the XT model that knows how to cut and normalise)."""
    context = context_of(form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomWeightsWarning)
        model = xm.create_model(
            encoder, context=None if context == "none" else context, region=REGION
        )
    for module in model.region_encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            # Some are zero at first in SwinV2: its blocks would pass their input on.
            torch.nn.init.ones_(module.weight)
    model = model.to(DEVICE)
    if form.endswith(RECOMPUTED):
        model.recompute = RECOMPUTE
    if not form.startswith("naive"):
        return model, model
    whole = whole_image_swin(model.region_encoder, side, grow_window=form.endswith("grown"))
    return whole.to(DEVICE), model


def make_step(form: str, mode: str, batch: int, net: Any, model: Any, pixels: np.ndarray) -> Any:
    """A call that does the work once, `batch` regions at a time, and gives the tokens `[L, C]`."""
    side = pixels.shape[0]
    grid = model.grid(side, side)
    image = torch.from_numpy(pixels).movedim(-1, 0)

    def regions() -> torch.Tensor:
        cut = model.extract(image.to(DEVICE), grid)
        return torch.cat([model.region_encoder(part).flatten(0, 2) for part in cut.split(batch)])

    def naive() -> torch.Tensor:
        whole = model.extract(image.to(DEVICE), RegionGrid(side, side, side))
        return net(whole)[-1].flatten(0, 2)

    def train() -> torch.Tensor:
        net.zero_grad(set_to_none=True)
        tokens = net(image.to(DEVICE)).tokens[0] if form.startswith("xt ") else plain()
        tokens.square().mean().backward()
        return tokens.detach()

    def infer() -> torch.Tensor:
        with torch.inference_mode():
            return plain()

    def stream() -> torch.Tensor:
        with xm.open_image(pixels) as source:
            return torch.cat([c.tokens for c in xm.stream_chunks(model, source, batch_size=batch)])

    plain = naive if form.startswith("naive") else regions
    if mode == "training":
        return train
    return stream if form.startswith("xt ") else infer


def check(tokens: torch.Tensor, form: str, mode: str, model: Any, pixels: np.ndarray) -> None:
    """One finite token a place; streamed, in small images, they are those of the whole at once."""
    side = pixels.shape[0]
    assert tokens.shape[0] == (side // model.stride) ** 2 and bool(tokens.isfinite().all())
    if form.startswith("xt ") and mode == "inference" and side <= 512 and not HAS_GPU:
        with torch.inference_mode():
            whole = model(torch.from_numpy(pixels).movedim(-1, 0)).tokens[0]
        # Chunks come in another order: the mean and the mean square do not mind.
        torch.testing.assert_close(tokens.mean(0), whole.mean(0), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            tokens.square().mean(0), whole.square().mean(0), atol=1e-4, rtol=1e-3
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", required=True)
    parser.add_argument("--encoder", default="swinv2_tiny")
    parser.add_argument("--side", type=int, required=True, help="of the square image, pixels")
    parser.add_argument("--mode", choices=["inference", "training"], default="inference")
    parser.add_argument("--batch", type=int, default=16, help="regions at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60, help="no new round after these")
    args = parser.parse_args()

    torch.manual_seed(0)
    net, model = build(args.form, args.encoder, args.side)
    pixels = np.random.default_rng(0).integers(0, 256, (args.side, args.side, 3), dtype=np.uint8)
    net.train(args.mode == "training")
    step = make_step(args.form, args.mode, args.batch, net, model, pixels)

    if HAS_GPU:
        before = torch.cuda.memory_allocated()
    tick, ticks = yardstick(DEVICE), []
    tick()
    reset_peak_rss()
    base = current_rss()
    times: list[float] = []

    def clocked() -> tuple[torch.Tensor, float]:
        begin = time.perf_counter()
        found = step()
        if HAS_GPU:
            torch.cuda.synchronize()
        took = time.perf_counter() - begin
        ticks.append(seconds(tick))
        return found, took

    with torch.autocast(DEVICE, DTYPE, enabled=HAS_GPU):
        start = time.perf_counter()
        tokens, first = clocked()
        # A first call that takes most of the time there is stands for itself; others warm up.
        if warm := first < args.seconds / 2:
            while len(times) < args.rounds and (
                not times or start + args.seconds > time.perf_counter()
            ):
                times.append(clocked()[1])
        else:
            times.append(first)
    peak = torch.cuda.max_memory_allocated() - before if HAS_GPU else peak_rss() - base
    check(tokens, args.form, args.mode, model, pixels)
    count = model.grid(args.side, args.side).num_regions
    row = {"seconds": spread(times), "memory": peak, "regions": count}
    row |= {"regions_per_s": count / row["seconds"]["median"], "region": model.config.region}
    row |= {"parameters": sum(p.numel() for p in net.parameters()), "warm": warm}
    row |= {"threads": torch.get_num_threads(), "yardstick": statistics.median(ticks)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
