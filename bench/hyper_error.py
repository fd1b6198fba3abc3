"""Which window, residual and sizes of `hyper_attention` err least, at 512 keys a query.

    python bench/hyper_error.py [--length 16384] [--seeds 3] [--out RECORD.json]

Prints the table of docs/hyper_attention.md: relative error against exact attention (Frobenius norm)
and processor time, each as a ratio to the published algorithm, mean of the seeds. Inputs are those
of `inputs.py` and features that a timm backbone (ConvNeXt-atto, stride 4, random weights) gives for
two real photographs. Their query is their key: like attends to like.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from baselines import published_hyper_attention
from inputs import clustered, gaussian, image_like, relative_error
from measure import write_record

import xt_kernels as xk

TILE = 16
Tensors = tuple[torch.Tensor, ...]


def photographs(shape: tuple[int, ...], seed: int) -> Tensors:
    """(query, key, value) from the features of a photograph, a different one for odd seeds."""
    import timm
    from sklearn.datasets import load_sample_image

    _, heads, length, head_dim = shape
    side = math.isqrt(length)
    torch.manual_seed(seed)
    backbone = timm.create_model("convnext_atto", features_only=True, out_indices=(0,)).eval()
    name = "flower.jpg" if seed % 2 else "china.jpg"
    image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(image, size=(4 * side, 4 * side), mode="bicubic")
    with torch.no_grad():
        features = backbone((image - image.mean()) / image.std())[0]
    rows = features.flatten(2).mT[0]
    rows = (rows - rows.mean(0)) / rows.std(0)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, heads, rows.shape[1], head_dim, generator=generator)
    key, value = rows @ (weights / rows.shape[1] ** 0.5)
    return key[None], key[None], value[None]


def tile_major(tensor: torch.Tensor) -> torch.Tensor:
    """Tokens `[B, H, L, D]` of a square image, row by row, in the order of 16 x 16 tiles."""
    side = math.isqrt(tensor.shape[2])
    rows = tensor.unflatten(2, (side // TILE, TILE, side // TILE, TILE))
    return rows.permute(0, 1, 2, 4, 3, 5, 6).flatten(2, 5)


MAKERS: dict[str, Callable[..., Tensors]] = {
    "Gaussian": gaussian,
    "128 clusters": clustered,
    "64 tight clusters": lambda *a: clustered(*a, clusters=64, spread=0.3),
    "image-like": lambda *a: tuple(map(tile_major, image_like(*a))),
    "image-like, unrelated": lambda *a: tuple(map(tile_major, image_like(*a, related=False))),
    "photographs": lambda *a: tuple(map(tile_major, photographs(*a))),
}


def ours(**options: object) -> Callable[..., torch.Tensor]:
    def form(*tensors: torch.Tensor, seed: int) -> torch.Tensor:
        found = xk.hyper_attention(*tensors, seed=seed, min_seq_len=0, **options)  # type: ignore[arg-type]
        assert isinstance(found, torch.Tensor)
        return found

    return form


def forms() -> dict[str, Callable[..., torch.Tensor]]:
    """What is compared; the first is what the rest is divided by."""
    found: dict[str, Callable[..., torch.Tensor]] = {"published": published_hyper_attention}
    found["lsh, uniform, 256 + 256"] = ours(residual="uniform")
    for window in ("lsh", "cluster", "tile"):
        for residual in ("sample", "mean"):
            found[f"{window}, {residual}, 256 + 256"] = ours(window=window, residual=residual)
        for keys, means in ((384, 128), (128, 384)):
            name = f"{window}, mean, {keys} + {means}"
            sizes = {"block_size": keys, "sample_size": means}
            found[name] = ours(window=window, residual="mean", **sizes)
    for window in ("lsh", "cluster"):
        found[f"{window}, none, 512"] = ours(window=window, block_size=512, residual="none")
        name = f"{window}, mean, 256 + 256, 8 bits"
        found[name] = ours(window=window, residual="mean", lsh_num_projs=8)
    return found


def measured(shape: tuple[int, ...], seeds: int) -> list[dict[str, object]]:
    """One row for each form and kind of input."""
    rows: list[dict[str, object]] = []
    for kind, maker in MAKERS.items():
        errors: dict[str, list[float]] = {name: [] for name in forms()}
        seconds: dict[str, list[float]] = {name: [] for name in forms()}
        for seed in range(seeds):
            tensors = maker(shape, seed)
            truth = torch.nn.functional.scaled_dot_product_attention(*tensors)
            for name, form in forms().items():
                start = time.process_time()
                out = form(*tensors, seed=seed)
                seconds[name].append(time.process_time() - start)
                errors[name].append(relative_error(out, truth))
        base_error = statistics.mean(errors["published"])
        for name in errors:
            pairs = zip(seconds[name], seconds["published"], strict=True)
            rows.append(
                {
                    "input": kind,
                    "form": name,
                    "error": statistics.mean(errors[name]),
                    "error_ratio": statistics.mean(errors[name]) / base_error,
                    "time_ratio": statistics.median(a / b for a, b in pairs),
                }
            )
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    """The table of the docs: forms by inputs."""
    kinds = list(dict.fromkeys(row["input"] for row in rows))
    lines = ["| form | " + " | ".join(map(str, kinds)) + " | time |"]
    lines.append("| --- |" + " --- |" * (len(kinds) + 1))
    for name in dict.fromkeys(row["form"] for row in rows):
        mine = [row for row in rows if row["form"] == name]
        time_ratio = statistics.median(float(str(row["time_ratio"])) for row in mine)
        first = name == "published"
        cells = [f"{row['error'] if first else row['error_ratio']:.2f}" for row in mine]
        cells = [f"({cell})" for cell in cells] if first else cells
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {time_ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16_384, help="tokens, a square of 16 n")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the record, JSON")
    options = parser.parse_args()
    shape = (1, options.heads, options.length, options.head_dim)
    rows = measured(shape, options.seeds)
    print(markdown(rows))
    record = {"shape": shape, "dtype": "float32", "seeds": options.seeds, "rows": rows}
    write_record(options.out, record)


if __name__ == "__main__":
    main()
