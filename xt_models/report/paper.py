"""The paper's values beside ours, where there is one of ours."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ..receptive_field import context_length
from .records import Row
from .tables import Cite, cite_all
from .text import Table, bytes_text, outcome_text

PAPER = Path(__file__).parent.parent / "assets" / "paper"
_CHUNK = {256: 1, 512: 1, 4096: 4}  # the paper's regions a chunk, by side of the image
_ENCODERS = {f"Swin-{size[0].upper()}": f"swinv2_{size}" for size in
             ("tiny", "small", "base", "large")}  # fmt: skip
_CONTEXTS = {"": "none", "Hyper": "hyper", "XL": "xl", "Mamba": "mamba", "ViT": "vit"}
NOT = "not measured"

FIGURE_6 = (
    "Figure 6 of the paper (A100, 80 GB): Swin-S on the whole image runs out of memory near "
    "2,800 px, xT stays nearly flat up to 3,000 px. Ours: the plot of memory above."
)


def _read(name: str) -> list[dict[str, str]]:
    with (PAPER / name).open() as file:
        return list(csv.DictReader(file))


def _image(
    rows: Sequence[Row],
    encoder: str,
    form: str,
    side: int,
    mode: str,
    like: Row | None = None,
    outcomes: Sequence[str] = ("measured",),
) -> Row | None:
    """What was measured of one form of one encoder on whole images; `like`: on the same device, in
    the same dtype.
    """
    return next(
        (r for r in rows if r.op == "image" and r.outcome in outcomes
         and (r.encoder, r.form, r.size, r.mode) == (encoder, form, side, mode)
         and (like is None or (like.shape.device, like.shape.dtype)
              == (r.shape.device, r.shape.dtype))), None,
    )  # fmt: skip


def _measured_on(row: Row) -> str:
    return f"{row.shape.device}, {row.shape.dtype}"


def paper_tables(rows: Sequence[Row], cite: Cite) -> list[tuple[str, Table]]:
    """(title, table) of each table that has something to stand beside."""
    return [_contexts(), _speeds(rows, cite), _encoders(rows, cite), _training(rows, cite)]


def _contexts() -> tuple[str, Table]:
    lines = []
    for row in _read("table1_context.csv"):
        layers = int(row["xl_layers"] or 0)
        side, region = int(row["input_px"]), int(row["region_px"])
        pixels = context_length(region, layers=layers, chunk_regions=_CHUNK[side])
        lines.append([
            row["model"], f"{side}/{region}", row["xl_layers"], f"{int(row['context_px']):,}",
            f"{pixels:,}" if layers else "",
        ])  # fmt: skip
    title = "Context in pixels (table 1; ours by `context_length`)"
    return title, (["model", "image/region", "XL layers", "paper", "ours"], lines)


def _speeds(rows: Sequence[Row], cite: Cite) -> tuple[str, Table]:
    lines = []
    for row in _read("released_throughput.csv"):
        side = int(row["size"].split("/")[0])
        encoder, context = _ENCODERS[row["model"]], _CONTEXTS[row["context"]]
        form = "naive" if not row["context"] else f"xt {context}"
        ours = _image(rows, encoder, form, side, "inference")
        cells = [NOT, NOT, "", ""]
        if ours is not None and ours.per_s:
            memory = bytes_text(ours.memory) if ours.memory else NOT
            cells = [f"{ours.per_s:.2f}", memory, _measured_on(ours), cite(ours.source)]
        lines.append([
            row["model"], row["context"] or "none", row["size"], row["regions_per_s"],
            f"{row['mem_gb']} GB", *cells,
        ])  # fmt: skip
    title = "Speed (README of the released code and figure 5: no GPU, batch or dtype named there)"
    head = ["model", "context", "image/region", "released, regions/s", "released, memory a region",
            "ours, regions/s", "ours, memory above the model", "ours on", "source"]  # fmt: skip
    return title, (head, lines)


def _encoders(rows: Sequence[Row], cite: Cite) -> tuple[str, Table]:
    lines = []
    for row in _read("table5_ablations.csv"):
        if row["ablation"] != "encoder":
            continue
        form = f"xt {_CONTEXTS[row['setting']]}"
        ours = _image(rows, _ENCODERS[row["model"]], form, 512, "inference")
        cells = [NOT, "", ""]
        if ours is not None and ours.memory:
            cells = [bytes_text(ours.memory), _measured_on(ours), cite(ours.source)]
        lines.append([row["model"], row["setting"], f"{row['mem_gb']} GB", *cells])
    title = "Memory by context encoder (table 5 of the paper, images of 512 px)"
    head = ["model", "context", "paper", "ours, above the model", "ours on", "source"]
    return title, (head, lines)


def _times_less(naive: Row, xt: Row | None) -> str:
    """How many times less memory xT takes, or what it takes where naive runs out; "" if unknown."""
    if xt is None or not xt.memory:
        return ""
    if naive.memory:
        return f"{naive.memory / xt.memory:.1f}"
    return f"{outcome_text(naive)}; xT {bytes_text(xt.memory)}"


def _training(rows: Sequence[Row], cite: Cite) -> tuple[str, Table]:
    lines = []
    table = {
        (row["context"], int(row["size"].split("/")[0])): row
        for row in _read("table6_locality.csv")
    }
    for side in (512, 1024):
        naive, xt = table["", side], table["XL", side]
        theirs = [
            f"{float(naive[name]) / float(xt[name]):.1f}"
            for name in ("mem_gb", "minutes_per_epoch")
        ]
        for encoder in ("swinv2_base", "swinv2_tiny"):
            one = _image(rows, encoder, "naive, window grown", side, "training",
                         outcomes=("measured", "out of memory"))  # fmt: skip
            other = one and _image(rows, encoder, "xt xl", side, "training", like=one)
            if one is not None and other is not None:
                break
        again = one and _image(rows, encoder, "xt xl, recomputed", side, "training", like=one)
        cells = [NOT, NOT, NOT, "", ""]
        if one and other and other.memory:
            weights = [_times_less(one, row) for row in (other, again)]
            time = f"{other.per_s / one.per_s:.1f}" if one.per_s and other.per_s else ""
            cells = [*weights, time, f"{encoder}, {_measured_on(one)}",
                     cite_all((one, other, again), cite)]  # fmt: skip
        lines.append([str(side), *theirs, *cells])
    head = ["side, px", "paper, memory a region", "paper, time", "ours, memory above the model",
            "ours, memory, recomputed", "ours, time", "ours on", "source"]  # fmt: skip
    title = (
        "Training, Swin on the whole image with its window grown, over xT with XL (table 6 of the "
        "paper: Swin-B)"
    )
    return title, (head, lines)
