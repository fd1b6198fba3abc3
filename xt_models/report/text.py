"""Values as people read them, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .records import Row, Spread

Table = tuple[list[str], list[list[str]]]
_UNITS = {"length": "tokens", "side": "px a side", "pixels": "Mpx"}


def number_text(value: float) -> str:
    """Three digits, and all of those before the point: `12,345`, `12.3`, `0.00123`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds_text(value: float) -> str:
    """`12.3 ms`."""
    for unit, scale in (("µs", 1e6), ("ms", 1e3), ("s", 1)):
        if value * scale < 999.5 or unit == "s":
            return f"{number_text(value * scale)} {unit}"
    raise AssertionError


def duration_text(value: float) -> str:
    """`12.3 s`, `4.5 min`, `2.1 h`."""
    for unit, scale in (("h", 3600), ("min", 60)):
        if value >= 2 * scale:
            return f"{value / scale:.1f} {unit}"
    return seconds_text(value)


def bytes_text(value: float) -> str:
    """`12.3 MiB`."""
    if value < 1000 * 2**20:
        return f"{value / 2**20:.{0 if value >= 100 * 2**20 else 1}f} MiB"
    return f"{value / 2**30:.{0 if value % 2**30 == 0 else 2}f} GiB"


def error_text(row: Row) -> str:
    """` (error 0.25)` of a form that approximates."""
    return f" (error {row.error:.2g})" if row.approximate else ""


def range_text(spread: Spread, text: str, low: str, high: str) -> str:
    """`text (low to high, n = 5)`, or without a range where one value has none."""
    return f"{text} ({low} to {high}, n = {spread.rounds})" if spread.rounds > 1 else text


def outcome_text(row: Row) -> str:
    """`out of memory (limit 20 GiB)`."""
    limit = row.outcome == "out of memory" and row.limit
    return row.outcome + (f" (limit {bytes_text(row.limit or 0)})" if limit else "")


def size_number(axis: str, size: float) -> str:
    return number_text(size / 1e6) if axis == "pixels" else f"{size:,.0f}"


def size_text(row: Row) -> str:
    """`1,024 px a side`, `1 region`, `4,096 tokens`."""
    unit = _UNITS.get(row.axis, row.axis)
    if row.size == 1:
        unit = unit.removesuffix("s")
    return f"{size_number(row.axis, row.size)} {unit}" if row.axis else ""


def unit_text(axis: str) -> str:
    return _UNITS.get(axis, axis)


def shape_text(row: Row) -> str:
    """`cpu, float32, batch 1, 12 heads of 64`, and what the record does not say."""
    shape = row.shape
    parts = [shape.device or "device not recorded", shape.dtype or "dtype not recorded"]
    parts.append(f"batch {shape.batch}" if shape.batch else "batch not recorded")
    if shape.heads and shape.head_dim:
        parts.append(f"{shape.heads} heads of {shape.head_dim}")
    if shape.threads:
        parts.append(f"{shape.threads} thread{'s' if shape.threads > 1 else ''}")
    return ", ".join(parts)


def join(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def markdown(table: Table) -> str:
    head, body = table
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in body]
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    return "".join(f"* {line}\n" for line in lines)


def folded(title: str, parts: Iterable[str]) -> list[str]:
    """Parts that show when the title is clicked."""
    return [f"<details><summary>{title}</summary>\n", *parts, "</details>\n"]


def shaped(rows: Sequence[Row], table: Table) -> list[str]:
    """A table with a line for each row, with dtype and batch: of all above it, or each in a column
    before the last.
    """
    shapes = [shape_text(row) for row in rows]
    if len(set(shapes)) == 1:
        return [f"All rows: {shapes[0]}.\n", markdown(table)]
    head, body = table
    lines = [[*line[:-1], shape, line[-1]] for line, shape in zip(body, shapes, strict=True)]
    return [markdown(([*head[:-1], "dtype and batch", head[-1]], lines))]
