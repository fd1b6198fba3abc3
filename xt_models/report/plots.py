"""Log-log plots of time and memory, error against time, time over the machine's floor, as SVG."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .records import Record, RecordError, Row

_AXES = {
    "length": "tokens", "regions": "regions", "side": "side of the image, px",
    "pixels": "pixels of the image", "chunks": "chunks",
}  # fmt: skip


def draw(records: Sequence[Record], folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """op -> (title, SVG file in `folder`) of its plots.

    Each plot is of one record, names its machine and commit, and has at least two points.
    Raises RecordError if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RecordError(
            "report: matplotlib is needed for plots: pip install 'xt-kernels[bench]'."
        ) from None
    # Text stays text, and the same rows give the same bytes.
    style = {"svg.hashsalt": "xt", "svg.fonttype": "none", "font.size": 9}
    made: dict[str, list[tuple[str, Path]]] = {}
    for record in records:
        for op, group in groupby(sorted(record.rows, key=lambda r: r.op), key=lambda r: r.op):
            rows = [row for row in group if row.outcome == "measured"]
            lost = [row for row in record.rows if row.op == op and row.outcome != "measured"]
            for kind, plot in (("time", _time), ("memory", _memory), ("error", _error),
                               ("floor", _floor)):  # fmt: skip
                title = f"{op}: {kind}"
                name = re.sub(r"\W+", "-", f"{record.path.stem}-{op}-{kind}").strip("-")
                file = folder / f"{name}.svg"
                with matplotlib.rc_context(style):
                    drawn = _figure(plot, title, record, rows, lost, file)
                if drawn:
                    made.setdefault(op, []).append((f"{title}, {record.where}", file))
    return made


def _figure(
    plot: Callable[[Any, list[Row], list[Row]], int], title: str, record: Record,
    rows: list[Row], lost: list[Row], file: Path,
) -> bool:  # fmt: skip
    """Writes one plot, unless it has nothing to show."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    if plot(axes, rows, lost) < 2:
        return False
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.supxlabel(record.where, fontsize=6, color="0.4")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None})
    return True


def _curves(
    axes: Any, rows: list[Row], lost: list[Row], value: Callable[[Row], float | None]
) -> int:
    """A line for each work and form over its sizes; the number of points that show growth."""
    points = 0

    def key(row: Row) -> tuple[str, str]:
        return row.variant, row.form

    for (variant, form), group in groupby(sorted(rows, key=key), key=key):
        line = sorted((row.size, y) for row in group if row.size and (y := value(row)))
        if not line:
            continue
        if len(line) > 1:
            points += len(line)
        along, values = zip(*line, strict=True)
        axes.plot(along, values, marker="o", markersize=3, label=f"{variant}: {form}")
        for row in lost:
            if key(row) == (variant, form):
                color = axes.lines[-1].get_color()
                axes.axvline(row.size, linestyle=":", color=color)
                axes.annotate(f" {form}: {row.outcome}", (row.size, values[-1]), fontsize=7,
                              color=color, ha="right")  # fmt: skip
    if points:
        axes.set(xscale="log", yscale="log", xlabel=_AXES.get(rows[0].axis, rows[0].axis))
        sizes = sorted({row.size for row in [*rows, *lost] if row.size})
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes.minorticks_off()
        # At least a decade: what is flat looks flat.
        low, high = axes.get_ylim()
        middle = (low * high) ** 0.5
        axes.set_ylim(min(low, middle / 3.3), max(high, middle * 3.3))
        _plain(axes.yaxis)
    return points


def _plain(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis, at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _time(axes: Any, rows: list[Row], lost: list[Row]) -> int:
    axes.set_ylabel("seconds")
    return _curves(axes, rows, lost, lambda row: row.seconds.median if row.seconds else None)


def _memory(axes: Any, rows: list[Row], lost: list[Row]) -> int:
    axes.set_ylabel("peak memory above inputs or model, MiB")
    return _curves(axes, rows, lost, lambda row: row.memory / 2**20 if row.memory else None)


def _error(axes: Any, rows: list[Row], lost: list[Row]) -> int:
    """Error against time; an exact form has none to show."""
    points = 0
    for row in rows:
        if row.error and row.seconds:
            label = f"{row.variant}: {row.form}, {row.size:,.0f}"
            axes.plot(row.seconds.median, row.error, "o", label=label)
            points += 1
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative error")
    _plain(axes.xaxis)
    axes.minorticks_off()
    return points


def _floor(axes: Any, rows: list[Row], lost: list[Row]) -> int:
    """How far above the time of a copy or a matrix product of the same size each form is."""
    shown = [row for row in rows if row.over_floor]
    for place, row in enumerate(shown):
        axes.barh(place, row.over_floor, color="C0" if row.form == row.first else "0.7")
    labels = [f"{r.variant}, {r.size:,.0f}: {r.form}" for r in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=6)
    axes.axvline(1, color="k", linewidth=1)
    axes.set_xlim(left=0.5)
    axes.set(xscale="log", xlabel="time over the floor of the machine (1: a copy, or a product)")
    _plain(axes.xaxis)
    return len(shown)
