"""Log-log plots of time and memory, error against time, time over the floor, a roofline, as SVG."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from .fields import RecordError
from .formats import ERRORS, SCALING
from .records import Record, Row
from .text import bytes_text

_AXES = {
    "length": "tokens", "regions": "regions", "side": "side of the image, px",
    "pixels": "megapixels of the image", "chunks": "chunks",
}  # fmt: skip

Pictures = dict[str, list[tuple[str, Path]]]


def draw(records: Sequence[Record], folder: Path) -> Pictures:
    """op -> (title, SVG file in `folder`) of its plots; "memory" and "roofline" are of several ops.

    Each plot names its machine and commit, and has at least two points. Raises RecordError if
    matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RecordError(
            "report: matplotlib is needed for plots: pip install 'xt-kernels[bench]'."
        ) from None
    made: Pictures = {}

    def add(work: str, name: str, title: str, plot: Any, rows: list[Row], where: str) -> None:
        file = folder / f"{re.sub(r'[^a-zA-Z0-9_]+', '-', name).strip('-')}.svg"
        if rows and _figure(plot, title, where, rows, file):
            made.setdefault(work, []).append((f"{title}, {where}", file))

    # Text stays text, and the same rows give the same bytes.
    style = {"svg.hashsalt": "xt", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        growing, wheres = _growing(records)
        title = "Peak memory of inference as the image grows; every point is measured"
        add("memory", "memory-by-image", title, _memory_by_image, growing, "; ".join(wheres))
        for record in records:
            stem, where = record.path.stem, record.where
            title = "Operations a second against operations a byte"
            add("roofline", f"{stem}-roofline", title, _roofline, record.rows, where)
            for op, group in groupby(sorted(record.rows, key=lambda r: r.op), key=lambda r: r.op):
                rows = _named_by_dtype(list(group))
                for kind, plot in _KINDS.items():
                    if op != ERRORS:
                        add(op, f"{stem}-{op}-{kind}", f"{op}: {kind}", plot, rows, where)
    return made


def _named_by_dtype(rows: list[Row]) -> list[Row]:
    """Rows of more than one dtype with that in the name of their variant: each is a line."""
    if len({row.shape.dtype for row in rows}) < 2:
        return rows
    return [
        replace(row, variant=", ".join(part for part in (row.variant, row.shape.dtype) if part))
        for row in rows
    ]


def _figure(
    plot: Callable[[Any, list[Row]], int], title: str, where: str, rows: list[Row], file: Path
) -> bool:
    """Writes one plot, unless it has nothing to show."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    if plot(axes, rows) < 2:
        return False
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.supxlabel(where.replace("; ", "\n"), fontsize=6, color="0.4")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None})
    return True


def _series(rows: Sequence[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    """((variant, form), rows by size)."""

    def key(row: Row) -> tuple[str, str]:
        return row.variant, row.form

    ordered = sorted(rows, key=lambda row: (*key(row), row.size))
    return [(name, list(group)) for name, group in groupby(ordered, key=key)]


def _curves(
    axes: Any, rows: list[Row], value: Callable[[Row], float | None],
    end: Callable[[Row], float | None] = lambda row: None, label: str = "{variant}: {form}",
) -> int:  # fmt: skip
    """A line for each work and form over its sizes; the number of points that show growth.

    end: where a row that ran out of memory is drawn, joined by dashes to what was measured.
    A form has a colour, a work a marker and a style of line; one size alone shows no growth.
    """
    points = ends = 0
    forms = list(dict.fromkeys(row.form for row in sorted(rows, key=lambda r: r.form != "ours")))
    unit = 1e6 if rows[0].axis == "pixels" else 1
    for (variant, form), group in _series(rows):
        line = [(row.size / unit, y) for row in group if row.size and (y := value(row))]
        lost = [(row.size / unit, row) for row in group if row.outcome == "out of memory"]
        if len(line) + len(lost) < 2:
            continue
        points += len(line) + len(lost)
        name = label.format(variant=variant, form=form)
        color = f"C{forms.index(form) % 10}"
        place = list(dict.fromkeys(r.variant for r in rows if r.form == form)).index(variant)
        marker, style = "os^Dv"[place % 5], ("-", "--", ":", "-.")[place % 4]
        if line:
            along, values = zip(*line, strict=True)
            axes.plot(along, values, style, marker=marker, markersize=4, label=name, color=color)
        for size, row in lost[:1]:
            text = f"{form}: out of memory"
            text += f" at {bytes_text(row.limit)}" if row.limit else ""
            note = {"fontsize": 7, "color": color, "textcoords": "offset points"}
            if (y := end(row)) is None:
                axes.axvline(size, linestyle=":", color=color)
                axes.annotate(f"{text} ", (size, 0.99), xycoords=axes.get_xaxis_transform(),
                              ha="right", va="top", xytext=(0, -9 * ends), **note)  # fmt: skip
            else:
                if line:
                    axes.plot([line[-1][0], size], [line[-1][1], y], "--", color=color, linewidth=1)
                axes.plot(size, y, "X", markersize=9, color=color, label=None if line else name)
                axes.annotate(text, (size, y), ha="center", xytext=(0, 8 + 9 * ends), **note)
            ends += 1
    if points:
        axes.set(xscale="log", yscale="log", xlabel=_AXES.get(rows[0].axis, rows[0].axis))
        sizes = _spaced(sorted({row.size / unit for row in rows if row.size}))
        axes.set_xticks(sizes, [f"{size:,.3g}" if size < 100 else f"{size:,.0f}" for size in sizes])
        axes.minorticks_off()
        # At least a decade: what is flat looks flat.
        low, high = axes.get_ylim()
        middle = (low * high) ** 0.5
        high = max(high, middle * 3.3) * (2 if any(end(row) for row in rows) else 1)
        axes.set_ylim(min(low, middle / 3.3), high)
        _plain(axes.yaxis)
    return points


def _spaced(sizes: list[float]) -> list[float]:
    """Those that leave their labels room on a logarithmic axis."""
    kept = sizes[:1]
    for size in sizes[1:]:
        if size > 1.3 * kept[-1]:
            kept.append(size)
    return kept


def _plain(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis, at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def _mib(row: Row) -> float | None:
    # Less than a tenth of a MiB is below what pages of memory tell.
    return row.memory / 2**20 if row.memory and row.memory > 2**20 / 10 else None


def _limit_mib(row: Row) -> float | None:
    lost = row.outcome == "out of memory" and row.limit
    return lost / 2**20 if lost else None


def _time(axes: Any, rows: list[Row]) -> int:
    axes.set_ylabel("seconds")
    return _curves(axes, rows, lambda row: row.seconds.median if row.seconds else None)


def _memory(axes: Any, rows: list[Row]) -> int:
    axes.set_ylabel("peak memory above inputs or model, MiB")
    return _curves(axes, rows, _mib, _limit_mib)


def _growing(records: Sequence[Record]) -> tuple[list[Row], list[str]]:
    """Rows of inference by pixels of the image, and where they were measured: of the scaling
    script, and of whole images where that has no naive form.
    """
    scaling = [r for record in records for r in record.rows if r.op == SCALING]
    both = any(row.form != "ours" for row in scaling)
    shown, wheres = list(scaling), []
    for record in records:
        images = [
            replace(r, axis="pixels", size=r.size**2, variant=f"{r.encoder}, image in memory",
                    form={"xt xl": "ours"}.get(r.form, r.form))
            for r in record.rows
            if r.op == "image" and r.mode == "inference" and not both
            and r.form in ("xt xl", "naive", "naive, window grown")
        ]  # fmt: skip
        shown += images
        if images or any(row.op == SCALING for row in record.rows):
            wheres.append(f"{record.path.name}: {record.where}")
    return shown, wheres


def _memory_by_image(axes: Any, rows: list[Row]) -> int:
    axes.set_ylabel("peak memory above the model, MiB")
    return _curves(axes, rows, _mib, _limit_mib, "{form}: {variant}")


def _error(axes: Any, rows: list[Row]) -> int:
    """Error against time of forms that approximate."""
    points = 0
    for row in rows:
        if row.approximate and row.seconds:
            label = f"{row.variant}: {row.form}, {row.size:,.0f}"
            axes.plot(row.seconds.median, row.error, "o", label=label)
            points += 1
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative error")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.minorticks_off()
    return points


def _floor(axes: Any, rows: list[Row]) -> int:
    """How far above the time of a copy or a matrix product of the same work each form is."""
    shown = [row for row in rows if row.over_floor]
    axes.figure.set_figheight(1.2 + 0.22 * len(shown))
    for place, row in enumerate(shown):
        axes.barh(place, row.over_floor, color="C0" if row.form == row.first else "0.7")
    labels = [f"{r.variant}, {r.size:,.0f}: {r.form}" for r in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=6)
    axes.axvline(1, color="k", linewidth=1)
    axes.set(xscale="log", xlabel="time over the floor of the machine (1: a copy, or a product)")
    axes.set_xlim(left=0.5)
    axes.minorticks_off()
    _plain(axes.xaxis)
    return len(shown)


def _roofline(axes: Any, rows: list[Row]) -> int:
    """Operations a second of each form whose bytes and operations are known, under the machine's
    ceilings: the most that the floors of the same record show of copies and matrix products.
    """
    shown = [row for row in rows if row.num_bytes and row.flops and row.seconds]
    if not shown:
        return 0
    floors = [row for row in rows if row.floor]
    copy = max((r.num_bytes / r.floor for r in floors if r.num_bytes and r.floor), default=0)
    peak = max((r.flops / r.floor for r in floors if r.flops and r.floor), default=0)
    along = [row.flops / row.num_bytes for row in shown if row.flops and row.num_bytes]
    low, high = min(along) / 4, max(along) * 4
    if copy and peak:
        low, high = min(low, peak / copy / 4), max(high, peak / copy * 4)
        ridge = [low, peak / copy, high]
        axes.plot(ridge, [copy * low / 1e9, peak / 1e9, peak / 1e9], color="k", linewidth=1)
        axes.annotate(f"copy {copy / 1e9:.3g} GB/s", (low, copy * low / 1e9), fontsize=7,
                      xytext=(4, 8), textcoords="offset points")  # fmt: skip
        axes.annotate(f"matrix product {peak / 1e9:.3g} GFLOP/s", (high, peak / 1e9), fontsize=7,
                      ha="right", xytext=(0, 4), textcoords="offset points")  # fmt: skip
    labels = list(dict.fromkeys(f"{row.op}: {row.form}" for row in shown))
    for row, intensity in zip(shown, along, strict=True):
        assert row.seconds and row.flops
        name = f"{row.op}: {row.form}"
        known = axes.get_legend_handles_labels()[1]
        axes.plot(intensity, row.flops / row.seconds.median / 1e9,
                  "o" if row.form == row.first else "x", color=f"C{labels.index(name) % 10}",
                  label=None if name in known else name)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP a second")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.minorticks_off()
    return len(shown) + 1


_KINDS = {"time": _time, "memory": _memory, "error": _error, "floor": _floor}
